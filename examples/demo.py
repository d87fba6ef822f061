"""Ask the embedded tiny model about the pictures in examples/pictures, then say how to go on."""

from __future__ import annotations

from pathlib import Path

from mmtool.llm import ModelType, chat, get_model_tokenizer, get_template

PICTURES = Path(__file__).parent / "pictures"

# (picture, questions about it, asked one after the other in one conversation)
CONVERSATIONS = (
    ("shapes.png", ("How many shapes are there?", "Describe the picture.", "图中有几个图形？")),
    ("circle.png", ("What colour is it? Answer in one word.", "这是什么形状？")),
    ("digits.png", ("What number is written in the picture?",)),
    ("word.png", ("What does it say?",)),
    ("sum.png", ("What is the sum?", "结果是多少？")),
)


def main() -> None:
    """Load the model once and hold every conversation."""
    model, tokenizer = get_model_tokenizer(ModelType.tiny)
    template = get_template(None, tokenizer)
    for picture, questions in CONVERSATIONS:
        path = PICTURES / picture
        print(f"\n[{path.relative_to(PICTURES.parent.parent)}]")
        messages: list[dict] = []
        for question in questions:
            parts: list[dict] = [{"type": "text", "text": question}]
            if not messages:
                parts.insert(0, {"type": "image", "image": str(path)})
            messages.append({"role": "user", "content": parts})
            answer = chat(model, template, messages)
            messages.append({"role": "assistant", "content": answer.text})
            print(f"  <<< {question}\n  {answer.text}")
    print(
        "\nNow ask your own questions:\n"
        "  .venv/bin/mmtool infer                 # a chat; after each question it asks for a picture\n"
        "  .venv/bin/mmtool infer --query 'How many shapes?' --images examples/pictures/shapes.png\n"
        "  .venv/bin/mmtool infer --help"
    )


if __name__ == "__main__":
    main()
