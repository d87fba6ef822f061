"""Make the archives in tests/golden from the whole set of golden data.

    python tests/make_golden_selection.py FOLDER

Weights that no chosen case reads (rows of tables: other words, other places in a picture, a layer whose output is not
used) are set to zero, so that they pack well; all others keep every bit, and the results of the chosen cases as well.
"""

from __future__ import annotations

import io
import json
import lzma
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from mmtool.llm import get_model_tokenizer, get_template

HERE = Path(__file__).parent / "golden"
# Position of a byte in its float counts: so the exponents, which are alike, find each other.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 2, "lp": 2}]
EPOCH = 1_577_836_800


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is taken of a folder.

    Attributes:
        cases: names of cases with their tensors.
        light: names of cases without their tensors, which are large; ``*`` for all others.
        dropped: tensors that are left out, of all cases or of one (``case/tensor``).
        logits: the name under which the logits of the last eight positions are kept instead of all.
        files: further files.
    """

    cases: Sequence[str]
    light: Sequence[str] = ()
    dropped: Sequence[str] = ()
    logits: str = "logits"
    files: Sequence[str] = ()


CHOICES: Mapping[str, Choice] = {
    "fm9g/gqa": Choice(cases=("text_only", "train_chat")),
    "fm9g4b-v": Choice(
        cases=("tiny_image", "train_single_turn"),
        dropped=("pixel_values", "patch_attention_mask", "train_single_turn/logits"),
        files=("slicing_table.json", "position_buckets.json", "tokenizer_cases.json"),
    ),
    "internlm-xcomposer2/variant_4khd": Choice(
        cases=("image_hd4",),
        dropped=("pixel_full_stride8", "inputs_embeds"),
        logits="logits_last8",
        files=("size_table.json",),
    ),
    "megrez-3b-omni": Choice(
        cases=("tiny_image", "audio_short", "train_text"),
        dropped=("inputs_embeds",),
        logits="logits_last8",
        files=("slicing_table.json", "audio_token_table.json"),
    ),
    "yi-vl": Choice(
        cases=("image_wide",),
        dropped=("inputs_embeds",),
        light=("*",),
        files=("preprocess/preprocess.json", "tokenizer_cases.json", "real_tokenizer_cases.json", "stop_cases.json"),
    ),
}


def read(path: Path) -> dict[str, Any]:
    """Return a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def rows_of(case: Mapping[str, Any], folder: Path) -> list[list[dict]]:
    """Return the conversations of a case, media as paths."""
    rows = [row["messages"] for row in case.get("batch", [case])]
    for part in (part for row in rows for message in row for part in message["content"]):
        if part["type"] != "text":
            part[part["type"]] = str(folder / part[part["type"]])
    return rows


def used_weights(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Return for every weight, by our name, which of its rows have a gradient in one of the cases."""
    model, tokenizer = get_model_tokenizer(
        None, torch.float32, model_id_or_path=folder / "checkpoint", attn_impl="eager"
    )
    for name, buffer in model.named_buffers():
        if name.endswith("positional_embedding"):  # stored, not trained
            buffer.requires_grad_()
    weights = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if b.requires_grad}
    for weight in weights.values():
        weight.requires_grad_()
    for name in names:
        case, expected = (read(folder / "cases" / name / f"{kind}.json") for kind in ("case", "expected"))
        settings = dict(case.get("options", {})) | ({"hd_num": case["hd_num"]} if "hd_num" in case else {})
        for system in (None, ""):  # whichever the record is of
            template = get_template(None, tokenizer, system, processor_kwargs=settings)
            recorded = expected.get("rows") or expected.get("batch") or [expected]
            answers = [row["generated_ids"] for row in recorded if "generated_ids" in row]
            for number, messages in enumerate(rows_of(json.loads(json.dumps(case)), folder)):
                row = template.encode(messages, train=messages[-1]["role"] == "assistant")
                row.pop("labels", None)
                batches = [row]
                if number < len(answers):
                    batches.append({**row, "input_ids": row["input_ids"] + answers[number]})
                for batch in batches:
                    logits = model(**template.collate([batch])).logits
                    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    none = torch.zeros(1, dtype=torch.bool)
    return {
        name: none
        if weight.grad is None
        else (weight.grad.flatten(1) if weight.ndim > 1 else weight.grad[:, None]).any(1)
        for name, weight in weights.items()
    } | {"": type(model)}


def thinned(state: dict[str, Tensor], used: Mapping[str, Any]) -> dict[str, Tensor]:
    """Set what is not used to zero, in place: weights may share their memory."""
    our_name = used[""].our_name
    for released, weight in state.items():
        rows = used.get(our_name(released))
        if rows is None:
            continue
        if not rows.any():
            weight.zero_()
        elif weight.ndim == 2 and rows.shape[0] == weight.shape[0]:
            weight[~rows] = 0
    return state


def packed(path: Path, used: Mapping[str, Any]) -> bytes:
    """Return a file of a checkpoint, weights thinned."""
    if path.suffix == ".safetensors":
        return save(thinned(load_file(path), used), {"format": "pt"})
    if path.suffix == ".bin":
        buffer = io.BytesIO()
        torch.save(thinned(torch.load(path, weights_only=True), used), buffer)
        return buffer.getvalue()
    return path.read_bytes()


def contents(root: Path, name: str, choice: Choice) -> dict[str, bytes]:
    """Return the files of a choice by their path in the archive."""
    folder = root / name
    every = sorted(path.name for path in (folder / "cases").iterdir())
    light = [case for case in every if case not in choice.cases] if "*" in choice.light else list(choice.light)
    cases = [*choice.cases, *light]
    used = used_weights(folder, cases)
    files = {path: packed(folder / path, used) for path in _below(folder, "checkpoint")}
    media: set[str] = set()
    for case in cases:
        case_json = (folder / "cases" / case / "case.json").read_bytes()
        files[f"cases/{case}/case.json"] = case_json
        files[f"cases/{case}/expected.json"] = (folder / "cases" / case / "expected.json").read_bytes()
        media |= {
            part[part["type"]]
            for row in [row["messages"] for row in json.loads(case_json).get("batch", [json.loads(case_json)])]
            for message in row
            for part in message["content"]
            if part["type"] != "text"
        }
    for case in choice.cases:
        tensors = load_file(folder / "cases" / case / "tensors.safetensors")
        kept = {key: t for key, t in tensors.items() if not {key, f"{case}/{key}"} & {*choice.dropped}}
        if "logits" in kept:
            kept[choice.logits] = kept.pop("logits")[..., -8:, :].contiguous()
        files[f"cases/{case}/tensors.safetensors"] = save(kept)
    for path in (*sorted(media), *choice.files):
        files[path] = (folder / path).read_bytes()
    return files


def _below(folder: Path, part: str) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in (folder / part).rglob("*") if path.is_file())


def main() -> None:
    """Write an archive for every choice, the same bytes for the same data."""
    root = Path(sys.argv[1])
    for name, choice in CHOICES.items():
        if len(sys.argv) > 2 and name not in sys.argv[2:]:
            continue
        archive = HERE / f"{name.replace('/', '.')}.tar.xz"
        with (
            lzma.open(archive, "wb", format=lzma.FORMAT_XZ, filters=FILTERS) as file,
            tarfile.open(fileobj=file, mode="w") as tar,
        ):
            sizes: dict[str, int] = {}
            for path, data in contents(root, name, choice).items():
                info = tarfile.TarInfo(f"{name}/{path}")
                info.size, info.mtime = len(data), EPOCH
                tar.addfile(info, io.BytesIO(data))
                sizes[path.split("/")[0]] = sizes.get(path.split("/")[0], 0) + len(data)
        print(f"{archive.name}: {archive.stat().st_size} bytes, unpacked {sizes}")


if __name__ == "__main__":
    main()
