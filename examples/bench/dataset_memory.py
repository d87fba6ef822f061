"""Measure what a large dataset costs: peak memory and seconds to check it, and to read it in random order.

Writes rows of text to one file, then in a fresh process runs what `mmtool sft` does with data before and while it
trains: index, check, split, shuffle, encode. The peak is VmHWM less what the process held before; `floor` is the same
with a hundred rows, so the difference is what the rows cost. Run:
python examples/bench/dataset_memory.py [--rows 1000000] [--kinds jsonl csv json parquet]
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

READ = 2000  # rows that are encoded in random order


def status(key: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def rows(number: int) -> Iterator[dict[str, str]]:
    """Make rows of about 150 bytes, each another one."""
    for index in range(number):
        yield {
            "query": f"What is {index} + {index % 97}? Show how you get there.",
            "response": f"It is {index * 2}. " * 4,
        }


def build(path: Path, number: int) -> None:
    """Write a file of rows, without holding them all."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        schema = pyarrow.schema([("query", pyarrow.string()), ("response", pyarrow.string())])
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            block = []
            for row in rows(number):
                block.append(row)
                if len(block) == 100_000:
                    writer.write_table(pyarrow.Table.from_pylist(block, schema))
                    block = []
            if block:
                writer.write_table(pyarrow.Table.from_pylist(block, schema))
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, ["query", "response"])
            writer.writeheader()
            writer.writerows(rows(number))
        elif path.suffix == ".json":
            for index, row in enumerate(rows(number)):
                file.write(("[" if index == 0 else ",\n") + json.dumps(row))
            file.write("]")
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows(number))


def measure(path: Path, check: str) -> None:
    """Load the file as training does and print what it took, as JSON."""
    import numpy as np

    from mmtool.data.sampling import Permutation
    from mmtool.data.train import load_training_data
    from mmtool.groups.sft import SftDataArgs
    from mmtool.loader import get_template, load_processor, open_folder

    spec, folder = open_folder("tiny")
    template = get_template(spec, load_processor(spec, folder), max_length=2048)
    template.encode([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], train=True)
    Path("/proc/self/clear_refs").write_text("5")  # set the peak back to the present
    before, start, cpu = status("VmRSS"), time.perf_counter(), time.process_time()
    data = load_training_data(SftDataArgs(dataset=[str(path)], check_dataset=check), template, spec)
    prepared, prepared_cpu = time.perf_counter() - start, time.process_time() - cpu
    checked_peak = status("VmHWM") - before
    order = Permutation(len(data.train), seed=1)
    start = time.perf_counter()
    for index in order.block(np.arange(min(READ, len(data.train)))).tolist():
        assert "error" not in data.train[index]
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "rows": len(data.train) + len(data.eval or ()),
                "file": path.stat().st_size,
                "peak": checked_peak,
                "peak_all": max(status("VmHWM") - before, checked_peak),
                "seconds": prepared,
                "cpu": prepared_cpu,
                "read": min(READ, len(data.train)) / seconds,
            }
        )
    )


def run(*arguments: str) -> dict:
    """Run this script in a fresh process and return what it measured."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    """Build, load, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="+", default=["jsonl", "csv", "json", "parquet"])
    parser.add_argument("--check", default="warn", choices=["warn", "off"])
    parser.add_argument("--scratch", type=Path, help="where a few hundred MB can be written for the time of a run")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(Path(args.measure[0]), args.measure[1])
    print(
        f"{'file':<9}{'rows':>9}{'size':>9}{'floor':>9}{'peak':>9}{'with reading':>14}"
        f"{'load':>9}{'load CPU':>10}{'rows/s read':>13}"
    )
    for kind in args.kinds:
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            small, large = Path(folder) / f"small.{kind}", Path(folder) / f"large.{kind}"
            build(small, 100)
            build(large, args.rows)
            floor, found = (run("--measure", str(path), args.check) for path in (small, large))
            print(
                f"{kind:<9}{found['rows']:>9}{found['file'] / 1e6:>6.0f} MB{floor['peak'] / 1e6:>6.1f} MB"
                f"{found['peak'] / 1e6:>6.1f} MB{found['peak_all'] / 1e6:>11.1f} MB"
                f"{found['seconds']:>7.0f} s{found['cpu']:>8.0f} s{found['read']:>13.0f}"
            )


if __name__ == "__main__":
    main()
