"""Chat with a server, answers printed while they come; the multi-turn client of the 9G guide.

The server keeps no conversations: the client sends the whole of it again each time. What the server computed for the
earlier turns it does not compute again. An empty line or Ctrl-D ends the chat. Start the server as for
`stream_once.py`.
"""

import os

from openai import OpenAI

client = OpenAI(api_key="fm9g", base_url=os.environ.get("BASE_URL", "http://localhost:8020/v1"))

history = []
while True:
    try:
        question = input("You: ")
    except EOFError:
        break
    if not question:
        break
    history.append({"role": "user", "content": question})
    answer = ""
    print("9G: ", end="")
    for chunk in client.chat.completions.create(model="9g", messages=history, stream=True):
        answer += chunk.choices[0].delta.content
        print(chunk.choices[0].delta.content, end="", flush=True)
    print()
    history.append({"role": "assistant", "content": answer})
