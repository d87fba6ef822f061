"""Get an answer in the form of a JSON schema; a small model needs the form more than a large one.

Start the server as for `picture.py`.
"""

import json
import os

from openai import OpenAI

client = OpenAI(api_key="fm9g", base_url=os.environ.get("BASE_URL", "http://localhost:8020/v1"))

schema = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["sum"],
    "additionalProperties": False,
}
answer = client.chat.completions.create(
    model="9g",
    messages=[{"role": "user", "content": "What is 2 + 3?"}],
    response_format={"type": "json_schema", "json_schema": {"name": "sum", "schema": schema, "strict": True}},
)
print(json.loads(answer.choices[0].message.content))
