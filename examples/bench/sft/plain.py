"""The yardstick: LoRA fine-tuning with transformers' Trainer and peft and nothing else, as most people would write it.

    python examples/bench/sft/plain.py MODEL ROWS.jsonl --output_dir FOLDER --batch_size 4 --epochs 3

Needs transformers and peft only, so that it also runs in the environments of the peers.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

LAYERS = {"all": "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj", "qkv": "q_proj|k_proj|v_proj"}


class Rows(torch.utils.data.Dataset):
    """Rows of a jsonl file, encoded when they are asked for; the answer is learned, the prompt is not."""

    def __init__(self, path: str, processor: Any) -> None:
        with open(path, encoding="utf-8") as file:
            self.rows = [json.loads(line) for line in file]
        self.processor = processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        question, answer = (message["content"] for message in row["messages"])
        images = [Image.open(path).convert("RGB") for path in row.get("images", [])]
        parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": question.removeprefix("<image>")}]
        chat = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        text = self.processor.apply_chat_template(chat)
        prompt = self.processor.apply_chat_template(chat[:1])
        encoded = self.processor(images=images or None, text=f"<s>{text}", return_tensors="pt")
        ids = encoded["input_ids"][0]
        labels = ids.clone()
        answer_ids = self.processor.tokenizer(text[len(prompt) :], add_special_tokens=False)["input_ids"]
        labels[: len(ids) - len(answer_ids)] = -100
        return {"input_ids": ids, "labels": labels, "pixel_values": encoded.get("pixel_values")}


def collate(rows: list[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """Stack rows, padded on the right."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([row["input_ids"] for row in rows], batch_first=True, padding_value=pad_id)
    batch = {
        "input_ids": ids,
        "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=-100),
        "attention_mask": pad([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True),
    }
    if rows[0]["pixel_values"] is not None:
        batch["pixel_values"] = torch.cat([row["pixel_values"] for row in rows])
    return batch


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--targets", choices=list(LAYERS), default="all")
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32)
    targets = rf".*language_model.*\.({LAYERS[args.targets]})"
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets))
    pad_id = processor.tokenizer.pad_token_id
    settings = TrainingArguments(
        output_dir=args.output_dir,
        per_device_train_batch_size=args.batch_size,
        num_train_epochs=args.epochs,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataloader_num_workers=args.workers,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = Rows(args.rows, processor)
    Trainer(model=model, args=settings, train_dataset=rows, data_collator=lambda items: collate(items, pad_id)).train()


if __name__ == "__main__":
    main()
