"""Measure the peak memory of loading a checkpoint: at most 1.15 times the weights in the dtype asked for.

Builds a synthetic Yi-VL folder (2 GB as bfloat16, twice that as float32) for each stored dtype and file layout, and
loads it in a fresh process, into each dtype. Two peaks, both of which count pages of mapped files as well:

- process: all that a process holds that imports mmtool and calls ``get_model_tokenizer``, Python and torch included;
- load: VmHWM of loading alone, less what the process held before.

Run: python examples/bench/load_memory.py [--scratch FOLDER] [--layouts ...] [--stored ...] [--loaded ...]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 1.15
LAYOUTS = ("bin shards", "one bin", "safetensors shards", "one safetensors")
STORED = ("bfloat16", "float16", "float32")
LOADED = ("bfloat16", "float32")
WHOLE = (
    "import torch; from mmtool.llm import get_model_tokenizer; "
    "get_model_tokenizer('yi-vl-6b-chat', torch.{dtype}, model_id_or_path={folder!r})"
)


def status(key: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def build(folder: Path, dtype: str, layout: str, shard_size: str = "700MB") -> None:
    """Write the synthetic folder: 1.01 billion parameters, with large embeddings, as in the release."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    from mmtool.loader import open_folder
    from mmtool.models.yi_vl.configuration_yi_vl import YiVLConfig
    from mmtool.models.yi_vl.conversion_yi_vl import TOWER_IN_SHARDS
    from mmtool.models.yi_vl.modeling_yi_vl import YiVLForConditionalGeneration

    tiny = open_folder("tiny")[1]
    for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tiny / file, folder)
    text = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 14, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 6, "num_attention_heads": 16}
    config = YiVLConfig(
        text_config=text | {"num_key_value_heads": 4, "vocab_size": 64000},
        vision_config=vision | {"image_size": 448, "patch_size": 14, "hidden_act": "gelu"},
        image_token_id=json.loads((tiny / "config.json").read_text())["image_token_id"],
        dtype=dtype,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = YiVLForConditionalGeneration(config)
    prefix = "model.vision_tower."
    names = {"model.language_model.": "model.", "model.multi_modal_projector.": "model.mm_projector."}
    main, tower = {}, {}
    for name, weight in model.state_dict().items():
        tensor = torch.full(weight.shape, 0.01, dtype=getattr(torch, dtype))
        if name.startswith(prefix):
            tower[f"vision_model.{name.removeprefix(prefix)}"] = tensor
        else:
            for ours, released in names.items():
                name = released + name.removeprefix(ours) if name.startswith(ours) else name
            main[name] = tensor
    save, stem, suffix = (
        (save_file, "model", "safetensors") if "safe" in layout else (torch.save, "pytorch_model", "bin")
    )
    save(tower, folder / config.vision_folder_name / f"{stem}.{suffix}")
    assert not any(name.startswith(TOWER_IN_SHARDS) for name in main)
    if layout.startswith("one"):
        save(main, folder / f"{stem}.{suffix}")
        return
    pattern = f"{stem}{{suffix}}.{suffix}"
    split = split_torch_state_dict_into_shards(main, filename_pattern=pattern, max_shard_size=shard_size)
    for file, tensors in split.filename_to_tensors.items():
        save({name: main[name] for name in tensors}, folder / file)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def measure(folder: Path, dtype: str) -> None:
    """Load the folder and print what it took, as JSON."""
    import torch

    from mmtool.models.yi_vl.modeling_yi_vl import YiVLForConditionalGeneration

    Path("/proc/self/clear_refs").write_text("5")  # set the peak back to the present
    before, start = status("VmRSS"), time.perf_counter()
    model = YiVLForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
    seconds = time.perf_counter() - start
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert all(bool((parameter.detach().view(-1)[-1] - 0.01).abs() < 1e-3) for parameter in model.parameters())
    print(json.dumps({"peak": status("VmHWM") - before, "size": size, "seconds": seconds}))


def measure_process(folder: Path, dtype: str) -> int:
    """Load the folder as a user does, and return the most that the process held, in bytes."""
    code = WHOLE.format(dtype=dtype, folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(said)
    return usage.ru_maxrss * 1024


def run(*arguments: str) -> str:
    """Run this script in a fresh process and return what it prints."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def main() -> None:
    """Build, load, and print the table; exit code 1 where a peak is over the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="where 2 to 5 GB can be written for the time of a run")
    parser.add_argument("--build", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS, help="files to measure")
    parser.add_argument("--stored", nargs="+", choices=STORED, default=STORED, help="dtypes in the files")
    parser.add_argument("--loaded", nargs="+", choices=LOADED, default=LOADED, help="dtypes in memory")
    args = parser.parse_args()
    if args.build:
        return build(Path(args.build[0]), args.build[1], args.build[2])
    if args.measure:
        return measure(Path(args.measure[0]), args.measure[1])
    worst = 0.0
    print(
        f"{'files':<20}{'stored':<10}{'loaded':<10}{'weights':>9}{'process':>9}{'ratio':>7}{'load':>9}{'ratio':>7}{'time':>8}"
    )
    for layout in args.layouts:
        for stored in args.stored:
            with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
                run("--build", folder, stored, layout)
                for loaded in args.loaded:
                    found = json.loads(run("--measure", folder, loaded))
                    size, peaks = found["size"], (measure_process(Path(folder), loaded), found["peak"])
                    worst = max(worst, found["peak"] / size)
                    figures = "".join(f"{peak / 1e9:>6.2f} GB{peak / size:>7.3f}" for peak in peaks)
                    print(
                        f"{layout:<20}{stored:<10}{loaded:<10}{size / 1e9:>6.2f} GB{figures}{found['seconds']:>6.1f} s"
                    )
    print(f"worst {worst:.3f}, limit {LIMIT}")
    raise SystemExit(worst > LIMIT)


if __name__ == "__main__":
    main()
