"""Ask a server one question and print the answer while it comes; the single-turn client of the 9G guide.

Start the server first:

    mmtool serve --model_id_or_path /path/to/9G4B --port 8020 --api_key fm9g --served_model_name 9g

Without --model_id_or_path, the embedded model answers. BASE_URL names another server.
"""

import os

from openai import OpenAI

client = OpenAI(api_key="fm9g", base_url=os.environ.get("BASE_URL", "http://localhost:8020/v1"))

stream = client.chat.completions.create(
    model="9g",
    messages=[{"role": "user", "content": "Hello"}],
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content, end="", flush=True)
print()
