"""Measure the peak memory of `mmtool export --merge_lora true` beside merging in memory with peft.

Builds a synthetic Llama of 1.3 GB in bfloat16, in shards, and an adapter on all its linear layers; merges it in a fresh
process each time. The peak is VmHWM less what the process held after its imports. Fails where streaming takes more than
the largest shard and the adapter. Run: python examples/bench/export_memory.py [--scratch FOLDER]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARD = 250_000_000
SIZES = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 12, "num_attention_heads": 16}


def status(key: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def build(base: Path, adapter: Path) -> None:
    """Write the model and the adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, num_key_value_heads=4, vocab_size=32000, dtype="bfloat16", tie_word_embeddings=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(base, max_shard_size=SHARD)
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(adapter)


def stream(base: Path, adapter: Path, output: Path) -> None:
    """Merge as the command does."""
    from mmtool.args import ExportArgs
    from mmtool.export.layout import read_release
    from mmtool.export.main import export_main
    from mmtool.loader import open_folder
    from mmtool.options import read_args

    words = ["--model_id_or_path", base, "--ckpt_dir", adapter, "--merge_lora", "true", "--verify", "false"]
    words += ["--max_shard_size", str(SHARD), "--output_dir", output]
    args = read_args(ExportArgs, list(map(str, words)), "mmtool export")
    read_release(*open_folder(None, base))  # imports the modules of the model
    report(lambda: export_main(args))


def in_memory(base: Path, adapter: Path, output: Path) -> None:
    """Merge in a whole model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    assert LlamaForCausalLM  # imported before anything is measured

    def merge() -> None:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        model.merge_and_unload().save_pretrained(output, max_shard_size=SHARD)

    report(merge)


def report(merge: object) -> None:
    """Run and print peak and seconds as JSON."""
    before = status("VmRSS")
    started = time.perf_counter()
    merge()  # type: ignore[operator]
    print(json.dumps({"peak": status("VmHWM") - before, "seconds": time.perf_counter() - started}))


def main() -> None:
    """Build, merge in both ways, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="folder for 4 GB of files")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        {"stream": stream, "in memory": in_memory}[args.run[0]](*map(Path, args.run[1:]))
        return
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        base, adapter = Path(scratch) / "base", Path(scratch) / "adapter"
        build(base, adapter)
        files = sorted(path.stat().st_size for path in base.glob("*.safetensors"))
        adapter_size = sum(path.stat().st_size for path in adapter.glob("*.safetensors"))
        print(f"base {sum(files) / 1e9:.2f} GB in {len(files)} files, largest {files[-1] / 1e6:.0f} MB")
        print(f"adapter {adapter_size / 1e6:.0f} MB")
        peaks = {}
        for way in ("stream", "in memory"):
            command = [sys.executable, __file__, "--run", way, base, adapter, Path(scratch) / way.replace(" ", "-")]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            peaks[way] = found["peak"]
            print(f"{way:10} peak {found['peak'] / 1e6:6.0f} MB, {found['seconds']:.1f} s")
    limit = files[-1] + 2 * adapter_size  # the adapter as it is stored, and in float32
    if peaks["stream"] > limit:
        sys.exit(f"streaming takes more than {limit / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
