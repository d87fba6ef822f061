"""Ask a server about a picture of this machine, then ask again: the second turn computes neither picture nor history.

mmtool serve --port 8020 --api_key fm9g --served_model_name 9g
python examples/serve/picture.py examples/pictures/shapes.png
"""

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI

client = OpenAI(api_key="fm9g", base_url=os.environ.get("BASE_URL", "http://localhost:8020/v1"))
path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "pictures" / "shapes.png")
url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"

messages = []
for question in ("How many shapes are there?", "Describe the picture."):
    content = [{"type": "text", "text": question}]
    if not messages:
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    messages.append({"role": "user", "content": content})
    answer = client.chat.completions.create(model="9g", messages=messages)
    text = answer.choices[0].message.content
    cached = answer.usage.prompt_tokens_details.cached_tokens
    print(f"{question} {text} ({answer.usage.prompt_tokens} prompt tokens, {cached} of them known)")
    messages.append({"role": "assistant", "content": text})
