"""The models and rows that the comparison trains on: small, with random weights, but real in every other way.

Each workload is a LLaVA folder as transformers writes it (CLIP tower, Llama, processor, chat template) and a jsonl file
of conversations in OpenAI's form, with JPEGs beside it. Everything comes from seeds.

    python examples/bench/sft/workloads.py /tmp/bench_sft [tower vlm text vocabulary]
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %} ASSISTANT:"
    "{% else %} {% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{{ message['content'][0]['text'] }}{% endif %}</s>{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True)
class Workload:
    """What is trained, on what, and how.

    ``vision``, ``text``: layers and width of the tower and of the language model. ``words``: fewest and most words of
    a question and of an answer. ``batch_sizes``: each is a comparison of its own.
    """

    name: str
    vision: tuple[int, int]
    text: tuple[int, int]
    vocab_size: int
    num_rows: int
    pictures: bool
    question: tuple[int, int]
    answer: tuple[int, int]
    batch_sizes: tuple[int, ...]
    epochs: int = 3
    targets: str = "all"  # linear layers of the language model that get an adapter: "all" or "qkv"


WORKLOADS = {
    item.name: item
    for item in (
        Workload("tower", (12, 384), (2, 256), 4096, 48, True, (4, 9), (5, 12), (4,), targets="qkv"),
        Workload("vlm", (4, 192), (4, 256), 4096, 64, True, (4, 9), (5, 12), (1, 4)),
        Workload("text", (2, 64), (4, 256), 4096, 192, False, (8, 60), (10, 160), (4,), epochs=2),
        Workload("vocabulary", (2, 64), (2, 128), 131072, 32, False, (20, 40), (100, 180), (4,), epochs=1),
    )
}


def make_words(count: int) -> list[str]:
    """Return words that a tokenizer can learn."""
    rng = random.Random(0)
    syllables = [
        first + vowel + last for first in "bdfgklmnprstvz" for vowel in "aeiou" for last in ("", "n", "r", "s")
    ]
    return ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(count)]


def make_model(workload: Workload, folder: Path) -> None:
    """Write the model with its processor."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = make_words(1500)
    lines = [" ".join(words[start : start + 10]) for start in range(0, len(words), 10)] + ["USER: ASSISTANT:"]
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_processor = CLIPImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=fast,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    layers, width = workload.vision
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        image_size=224,
        patch_size=14,
        projection_dim=width,
    )
    depth, hidden = workload.text
    text = LlamaConfig(
        vocab_size=workload.vocab_size,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=depth,
        num_attention_heads=hidden // 64,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-1)
    LlavaForConditionalGeneration(config).float().save_pretrained(folder)


def make_rows(workload: Workload, folder: Path) -> None:
    """Write ``rows.jsonl``, and a picture for each row where the workload has pictures."""
    from PIL import Image, ImageDraw

    rng, words = random.Random(1), make_words(1500)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)

    def sentence(span: tuple[int, int]) -> str:
        return " ".join(rng.choices(words, k=rng.randint(*span)))

    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(workload.num_rows):
            question = sentence(workload.question)
            row = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]}
            row["messages"][1]["content"] = sentence(workload.answer)
            if workload.pictures:
                picture = Image.new("RGB", (224, 224), tuple(rng.randrange(256) for _ in range(3)))
                draw = ImageDraw.Draw(picture)
                for _ in range(12):
                    left, top = rng.randrange(180), rng.randrange(180)
                    box = (left, top, left + rng.randrange(10, 44), top + rng.randrange(10, 44))
                    draw.ellipse(box, fill=tuple(rng.randrange(256) for _ in range(3)))
                path = folder / "pictures" / f"{number}.jpg"
                picture.save(path, quality=90)
                row["messages"][0]["content"] = f"<image>{question}"
                row["images"] = [str(path)]
            file.write(json.dumps(row) + "\n")
    info = {
        "rows": {
            "file_name": "rows.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "messages"} | ({"images": "images"} if workload.pictures else {}),
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
            },
        }
    }
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def make(workload: Workload, folder: Path) -> Path:
    """Make a workload, unless it is there as it should be; return its folder, with ``model`` and ``rows.jsonl``."""
    folder = folder.resolve() / workload.name
    stamp = folder / "workload.json"
    wanted = json.dumps(asdict(workload))
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        folder.mkdir(parents=True, exist_ok=True)
        make_model(workload, folder / "model")
        make_rows(workload, folder)
        stamp.write_text(wanted, encoding="utf-8")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(WORKLOADS))
    asked = parser.parse_args()
    for name in asked.names or WORKLOADS:
        print(make(WORKLOADS[name], asked.folder))
