"""Run recorded cases of an original model through mmtool, and print the largest differences.

    python examples/check_folder.py DIR

DIR holds `checkpoint/` (a model folder in the layout of its release), `cases/<name>/` with `case.json`, `expected.json`
and `tensors.safetensors`, and the media that the cases name; or it holds such folders. One line is printed for each
case. The exit code is 1 when a case fails.

Everything goes through the public API: `get_model_tokenizer`, `get_template`, `template.encode`, `template.collate`,
`model(**batch)` and `chat`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from mmtool.errors import MMToolError
from mmtool.llm import chat, get_model_tokenizer, get_template
from mmtool.models.internlm_xcomposer2.processing_internlm_xcomposer2 import OFFICIAL_TRAINING_TILING
from mmtool.template.base import Template

# Absolute, float32, eager attention; a case may bring its own.
TOLERANCES = {"logits": 2e-4, "inputs_embeds": 1e-4, "loss": 1e-4}
# What somebody types stays text in mmtool. Cases that record the original turning it into control tokens are computed
# on the recorded ids instead, and so is a layout that the original used in training alone.
DEPARTURES = ("inject", "special_token_injection", "train_system_template")
MARK = -1  # stands for a whole medium in recorded ids


@dataclass
class Report:
    """What was compared in one case."""

    name: str
    notes: list[str] = field(default_factory=list)
    failed: bool = False

    def close(self, what: str, found: Tensor, wanted: Tensor, tolerance: float) -> None:
        """Compare tensors of one shape; note the largest difference."""
        if found.shape != wanted.shape:
            self.wrong(f"{what} has shape {list(found.shape)}, recorded {list(wanted.shape)}")
            return
        difference = (found.float() - wanted.float()).abs().max().item() if found.numel() else 0.0
        self.check(f"{what} {difference:.1e}", difference <= tolerance and not math.isnan(difference))

    def check(self, note: str, right: bool) -> None:
        """Note something and whether it is as recorded."""
        self.notes.append(note if right else f"{note} WRONG")
        self.failed |= not right

    def wrong(self, note: str) -> None:
        """Note a failure."""
        self.check(note, False)

    def __str__(self) -> str:
        return f"{'FAIL' if self.failed else 'ok  '} {self.name:36} {'; '.join(self.notes)}"


class Folder:
    """A model folder with its recorded cases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plain = self.load()
        self.model, self.tokenizer = self.plain
        self.template: Template = get_template(None, self.tokenizer)

    def load(self, **model_kwargs: Any) -> tuple[Any, Any]:
        """Load the model and its tokenizer."""
        checkpoint = self.folder / "checkpoint"
        return get_model_tokenizer(None, torch.float32, model_kwargs, model_id_or_path=checkpoint, attn_impl="eager")

    def run(self, case_dir: Path) -> Report:
        """Compare one case."""
        report = Report(case_dir.name)
        case, expected = read(case_dir / "case.json"), read(case_dir / "expected.json")
        tensors = load_file(path) if (path := case_dir / "tensors.safetensors").is_file() else {}
        tolerance = TOLERANCES | {k: v for k, v in expected.get("tolerance", {}).items() if isinstance(v, float)}
        try:
            self.prepare(case, case_dir)
            if "members" in case:
                rows = [read(case_dir.parent / name / "case.json")["messages"] for name in case["members"]]
                self.train_batch(report, rows, expected, tolerance)
            elif "batch" in case:
                rows = [row["messages"] for row in case["batch"]]
                is_training = rows[0][-1]["role"] == "assistant"
                (self.train_batch if is_training else self.infer_batch)(report, rows, expected, tolerance, tensors)
            elif case["messages"][-1]["role"] == "assistant":
                self.train(report, case["messages"], expected, tolerance)
            else:
                self.infer(report, case["messages"], expected, tolerance, tensors)
        except MMToolError as error:
            report.wrong(f"error: {error}")
        return report

    def prepare(self, case: dict, case_dir: Path) -> None:
        """Take the model and the template with the settings that a case asks for."""
        self.model, self.tokenizer = self.plain
        if "infer_mode" in case:
            self.model, self.tokenizer = self.load(task_mode=case["infer_mode"])
        if "adapter" in case:
            self.model = PeftModel.from_pretrained(self.load()[0], case_dir / case["adapter"]).eval()
        processor_kwargs = dict(case.get("options", {}))
        if "hd_num" in case:
            processor_kwargs["hd_num"] = case["hd_num"]
        if case.get("kind") == "train_optional":
            processor_kwargs |= OFFICIAL_TRAINING_TILING
        template_kwargs = {}
        if "image_position" in case:  # the picture is named apart from the text
            template_kwargs["image_position"] = "auto"
            case["messages"][-1]["content"].append({"type": "image", "image": case["images"][0]})
        self.settings = {"processor_kwargs": processor_kwargs, "template_kwargs": template_kwargs}
        self.template = get_template(None, self.tokenizer, **self.settings)

    def without_system(self) -> None:
        """Leave the default system text out, where the records of a family do."""
        self.template = get_template(None, self.tokenizer, "", **self.settings)

    @torch.no_grad()
    def infer(self, report: Report, messages: list, expected: Mapping, tolerance: Mapping, tensors: Mapping) -> None:
        """Compare a prompt and what the model makes of it."""
        messages = self.with_paths(messages)
        encoded = self.template.encode(messages)
        reading = matching(encoded, expected)
        if reading is None or "input_ids" not in expected:
            self.without_system()
            encoded = self.template.encode(messages)
            reading = matching(encoded, expected)
        departs = reading is None and report.name.startswith(DEPARTURES)
        if not departs:
            report.check(f"ids {reading or 'exact'}" if reading is not None else "ids", reading is not None)
        if reading == "":
            self.compare_embeds(report, encoded, tensors, tolerance)
            batch = self.template.collate([encoded])
        else:
            report.notes.append("computed on the recorded ids")
            batch = self.batch_of(expected["input_ids"], encoded)
        logits = self.model(**batch).logits[0]
        for name in ("logits", "logits_last8"):
            if name in tensors:
                wanted = tensors[name].flatten(0, -2)
                report.close("logits", logits[-len(wanted) :], wanted, tolerance["logits"])
        if (wanted_ids := expected.get("generated_ids" + (f"_{reading}" if reading else ""))) is not None:
            by_hand = departs or isinstance(self.model, PeftModel)
            found = (self.generate if by_hand else self.answer)(batch if by_hand else messages, len(wanted_ids))
            report.check("greedy exact" if begins(wanted_ids, found) else f"greedy {found}", begins(wanted_ids, found))

    def train(self, report: Report, messages: list, expected: Mapping, tolerance: Mapping) -> None:
        """Compare the loss of a conversation with those recorded for the layouts in use."""
        losses = dict(recorded_losses(expected))
        batch = self.trained([messages], losses, tolerance)
        if report.name.startswith(DEPARTURES):
            report.notes.append("computed on the recorded ids")
            encoded = self.template.encode(self.with_paths(messages), train=True)
            batch = self.batch_of(expected["input_ids"], encoded)
            batch["labels"] = torch.tensor([expected["labels"]])
        loss = self.loss(batch)
        best = min(losses, key=lambda name: abs(losses[name] - loss))
        difference = abs(losses[best] - loss)
        report.check(f"loss {difference:.1e}{f' ({best})' if best else ''}", difference <= tolerance["loss"])

    def train_batch(self, report: Report, rows: list, expected: Mapping, tolerance: Mapping, _: Any = None) -> None:
        """Compare the loss of conversations of different length."""
        batch = self.trained(rows, {"": expected["loss"]}, tolerance)
        difference = abs(self.loss(batch) - expected["loss"])
        report.check(f"loss {difference:.1e}", difference <= tolerance["loss"])

    def trained(self, rows: list, losses: Mapping[str, float], tolerance: Mapping) -> dict[str, Tensor]:
        """Return conversations as a batch to learn from, with the system text that gives a recorded loss."""
        batches = []
        for _ in range(2):
            encoded = [self.template.encode(self.with_paths(row), train=True) for row in rows]
            batches.append(self.template.collate(encoded))
            loss = self.loss(batches[-1])
            if min(abs(loss - recorded) for recorded in losses.values()) <= tolerance["loss"]:
                return batches[-1]
            self.without_system()
        return batches[0]

    @torch.no_grad()
    def infer_batch(self, report: Report, rows: list, expected: Mapping, tolerance: Mapping, tensors: Mapping) -> None:
        """Compare a padded batch with what was recorded, and with its rows one by one."""
        rows = [self.with_paths(row) for row in rows]
        recorded = (
            expected.get("rows") or expected.get("batch") or [{"generated_ids": i} for i in expected["generated_ids"]]
        )
        if recorded[0].get("input_ids") and not any(
            same_ids(self.template.encode(rows[0]), recorded[0]["input_ids"][skip:])
            for skip in range(len(recorded[0]["input_ids"]))
        ):
            self.without_system()
        encoded = [self.template.encode(row) for row in rows]
        logits = self.model(**self.template.collate(encoded, padding_side="left")).logits[:, -1]
        alone = torch.stack([self.model(**self.template.collate([row])).logits[0, -1] for row in encoded])
        report.close("batch against single", logits, alone, tolerance["logits"])
        for name in ("logits", "last_logits", "logits_last"):
            if name in tensors:
                wanted = tensors[name]
                report.close("logits", logits, wanted if wanted.ndim == 2 else wanted[:, -1], tolerance["logits"])
        for messages, row in zip(rows, recorded, strict=True):
            found = self.answer(messages, len(row["generated_ids"]))
            report.check("greedy exact", begins(row["generated_ids"], found))

    # -- steps -------------------------------------------------------------------------------------------------------

    def with_paths(self, messages: list[dict]) -> list[dict]:
        """Return messages whose media are found from here."""

        def part(item: dict) -> dict:
            kind = item["type"]
            return item if kind == "text" else {**item, kind: str(self.folder / item[kind])}

        def content(value: Any) -> Any:
            return value if isinstance(value, str) else [part(item) for item in value]

        return [{**message, "content": content(message["content"])} for message in messages]

    def answer(self, messages: list[dict], count: int) -> list[int]:
        """Return the ids of a greedy answer."""
        return chat(
            self.model, self.template, messages, max_new_tokens=count, do_sample=False, repetition_penalty=1.0
        ).token_ids

    def generate(self, batch: Mapping[str, Tensor], count: int) -> list[int]:
        """Return greedy ids behind a prompt that no conversation gives."""
        output = self.model.generate(
            **batch,
            max_new_tokens=count,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=list(self.template.stop_token_ids),
        )
        return output[0, batch["input_ids"].shape[1] :].tolist()

    def batch_of(self, ids: list[int], encoded: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the model's inputs for recorded ids, with the media of a conversation."""
        media = iter(encoded["media"])
        full: list[int] = []
        for token in ids:
            if token < 0:
                item = next(media)
                full += encoded["input_ids"][item.start : item.start + item.length]
            else:
                full.append(token)
        return self.template.collate([{**encoded, "input_ids": full, "labels": full}], "left") | {"labels": None}

    def loss(self, batch: Mapping[str, Tensor]) -> float:
        """Return the mean loss over the labels of a batch."""
        with torch.no_grad():
            return self.model(**batch).loss.item()

    def compare_embeds(self, report: Report, encoded: Mapping, tensors: Mapping, tolerance: Mapping) -> None:
        """Compare what goes into the decoder: text embeddings with media features among them."""
        ids = torch.tensor(encoded["input_ids"])
        places = torch.zeros(len(ids), dtype=torch.bool)
        rows: list[Tensor] = []
        for item in encoded["media"]:
            offsets = torch.arange(item.length) if item.feature_index is None else torch.tensor(item.feature_index)
            places[item.start + offsets] = True
            tower = {"image": "get_image_features", "audio": "get_audio_features"}[item.kind]
            rows += getattr(self.model, tower)(**item.inputs).pooler_output
        embeds = self.model.get_input_embeddings()(ids.masked_fill(places, 0))
        if rows:
            embeds[places] = torch.cat(rows).to(embeds)
        for name, step in (("inputs_embeds", 1), ("inputs_embeds_stride8", 8)):
            if name in tensors:
                wanted = tensors[name].flatten(0, -2)
                report.close("embeddings", embeds[::step][-len(wanted) :], wanted, tolerance["inputs_embeds"])


def read(path: Path) -> dict:
    """Return a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def begins(recorded: list[int], found: list[int]) -> bool:
    """Tell whether an answer is the recorded one, as far as it goes: mmtool stops at stop words, records do not."""
    return list(found) == list(recorded[: len(found)]) and len(found) > 0


def matching(encoded: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """Return which recorded reading of a prompt ours is: "" for the first, the rest of its name for others, or None.

    A case that records no ids is about something else.
    """
    if "input_ids" not in expected:
        return ""
    for name, ids in expected.items():
        if name.startswith("input_ids") and same_ids(encoded, ids):
            return name.removeprefix("input_ids").removeprefix("_")
    return None


def same_ids(encoded: Mapping[str, Any], recorded: list[int]) -> bool:
    """Compare ids; where the record has one mark for a medium, so has our side."""
    ids = list(encoded["input_ids"])
    if any(token < 0 for token in recorded):
        for item in reversed(encoded["media"]):
            ids[item.start : item.start + item.length] = [MARK]
        recorded = [max(token, MARK) for token in recorded]
    return ids == recorded


def recorded_losses(expected: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Give the losses of a training case by the name of their layout; "" is that of the original."""
    yield "", expected["loss"]
    if "loss_without_duplicate_end_target" in expected:
        yield "no duplicate end target", expected["loss_without_duplicate_end_target"]
    if "inference_layout" in expected:
        yield "layout of inference", expected["inference_layout"]["loss"]
    for name, variant in expected.get("variants", {}).items():
        yield name.replace("_", " "), variant["loss"]


def folders(root: Path) -> list[Path]:
    """Return the folders with cases in and below ``root``."""
    found = sorted({path.parent for path in root.rglob("cases") if (path.parent / "checkpoint").is_dir()})
    if not found:
        raise SystemExit(f"error: {root} holds no folder with checkpoint/ and cases/")
    return found


def main() -> None:
    """Check every case and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--case", help="only the cases whose name contains this")
    args = parser.parse_args()
    failed = total = 0
    for folder in folders(args.folder):
        print(f"{folder}")
        checked = Folder(folder)
        for case_dir in sorted(path for path in (folder / "cases").iterdir() if path.is_dir()):
            if args.case is None or args.case in case_dir.name:
                report = checked.run(case_dir)
                print(f"  {report}", flush=True)
                failed, total = failed + report.failed, total + 1
    print(f"{total} cases, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
