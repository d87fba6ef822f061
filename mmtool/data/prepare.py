"""Find the rows of a training run, check them, choose and split, and write down where they are."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmtool.data.check import (
    Bad,
    CheckReport,
    Encoder,
    FormatReader,
    Measure,
    RowChecker,
    Task,
    TrainFile,
    check_rows,
)
from mmtool.data.dataset import SUFFIXES, Row
from mmtool.data.formats import FormatCheck
from mmtool.data.index import IndexedFile, entries, index_file
from mmtool.data.media_cache import cache_folder
from mmtool.data.registry import DATASETS, DEFAULT_DATASET, read_dataset_info
from mmtool.data.sampling import Permutation, seed_of
from mmtool.data.sources import DataSource, find_sources
from mmtool.data.table import ROW, SPLITS, RowTable
from mmtool.errors import DataError, MMToolError
from mmtool.log import get_logger
from mmtool.spec import ModelSpec
from mmtool.utils import counted

if TYPE_CHECKING:
    from mmtool.groups.sft import SftDataArgs

RESULT, DROPPED = "data.json", "dropped.jsonl"
_VERSION = 1  # of the files in the folder
_MOST_FILES = 1 << 16  # a row notes the number of its file in 16 bits
_SKIPPED, _TRAIN, _EVAL = -1, 0, 1

logger = get_logger(__name__)


@dataclass
class _Plan:
    """A source, its files by number, and how many of its rows go where."""

    source: DataSource
    option: str
    files: list[int]
    total: int  # rows there are
    chosen: int  # rows taken, each once
    held_out: int = 0  # of these, to evaluate on

    @property
    def wanted(self) -> int:
        """How many rows of the main split there shall be, some of them more than once."""
        sample = self.chosen if self.source.sample is None else self.source.sample
        return max(sample, self.chosen) - self.held_out


class Preparation:
    """Index, choose, check, write down: what the main process does."""

    def __init__(
        self, options: SftDataArgs, spec: ModelSpec, encoder: Encoder, folder: Path, *, temporary: bool
    ) -> None:
        self.options = options
        self.spec = spec
        self.encoder = encoder
        self.folder = folder
        # Files get their place when they are whole; several machines may do this in one folder, with the same result.
        self.work = folder / f"unfinished-{platform.node()}-{os.getpid()}"
        self.temporary = temporary
        self.files: list[TrainFile] = []
        self.indices: list[Path] = []

    def run(self) -> None:
        """Write the result, unless it is there.

        Raises:
            MMToolError: for files, rows or options that the user can put right.
        """
        sources = self._sources("dataset"), self._sources("val_dataset")
        key = self._key(sources)
        if self._is_done(key):
            logger.info("data: checked before and unchanged since, see %s", self.folder / RESULT)
            for line in json.loads((self.folder / RESULT).read_text(encoding="utf-8"))["report"].splitlines():
                logger.info("%s", line)
            return
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        try:
            plans = self._plans(*sources)
            report, fingerprints = self._write_splits(plans)
            self._finish(key, plans, report, fingerprints)
        finally:
            shutil.rmtree(self.work, ignore_errors=True)

    # -- sources -----------------------------------------------------------------------------------------------------

    def _sources(self, option: str) -> list[DataSource]:
        options = self.options
        known = DATASETS
        if options.custom_dataset_info is not None:
            known = known | read_dataset_info(options.custom_dataset_info)
        named = getattr(options, option) or ([DEFAULT_DATASET] if option == "dataset" else [])
        if not getattr(options, option) and named:
            logger.info("--dataset is not given; taking %s, which is in the package", DEFAULT_DATASET)
        hub = options.dataset_hub
        return [source for text in named for source in find_sources(text, known, hub, option)]

    def _key(self, sources: tuple[list[DataSource], ...]) -> str:
        """Return what must be the same for a result to be taken again."""
        facts: list[Any] = [_VERSION, self._encoding(), self.spec.media_style]
        for name in ("dataset_test_ratio", "dataset_seed", "train_dataset_sample", "val_dataset_sample"):
            facts.append(getattr(self.options, name))
        for name in ("dataset_format", "columns", "media_root", "check_dataset"):
            facts.append(getattr(self.options, name))
        for part in sources:
            for source in part:
                facts.append(replace(source, files=()))
                facts += [(str(file.absolute()), *file_status(file)) for file in source.files]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def _encoding(self) -> str:
        """Return what decides how a conversation is encoded."""
        template = self.encoder.template
        processor = template.processor
        parts = [type(template).__qualname__, template.system, template.max_length, template.truncation_strategy]
        parts += [self.encoder.system, len(template.tokenizer), template.tokenizer.get_added_vocab()]
        parts += [
            part.to_json_string()
            for part in vars(processor).values()
            if part is not None and hasattr(part, "to_json_string")
        ]
        return repr(parts)

    def _is_done(self, key: str) -> bool:
        try:
            result = json.loads((self.folder / RESULT).read_text(encoding="utf-8"))
            stored = [file["file"] for file in result["files"]]
            same = all(file_status(Path(file["stored"])) == (file["size"], file["modified"]) for file in stored)
        except (OSError, ValueError, KeyError, MMToolError):
            return False
        return same and result["key"] == key and all((self.folder / f"{name}.rows").exists() for name in SPLITS)

    # -- choice ------------------------------------------------------------------------------------------------------

    def _plans(self, train: list[DataSource], evaluation: list[DataSource]) -> list[_Plan]:
        plans = [self._plan(source, "dataset") for source in train]
        plans += [self._plan(source, "val_dataset") for source in evaluation]
        self._tell_apart()
        ratio = self.options.dataset_test_ratio
        if ratio and not evaluation:
            self._warn_of_overlap(train)
            for plan in plans:
                plan.held_out = int(plan.chosen * ratio)
            largest = max(plans, key=lambda plan: plan.chosen)
            if not any(plan.held_out for plan in plans) and largest.chosen > 1:
                largest.held_out = 1
        return plans

    def _tell_apart(self) -> None:
        """Give files of the same name another one in messages."""
        paths = {train_file.file.path.absolute() for train_file in self.files}
        names = Counter(path.name for path in paths)
        for number, train_file in enumerate(self.files):
            path = train_file.file.path.absolute()
            if names[path.name] > 1:
                near = f"{path.parent.name}/{path.name}"
                alone = sum(other.parent.name == path.parent.name and other.name == path.name for other in paths) == 1
                self.files[number] = replace(
                    train_file, file=replace(train_file.file, label=near if alone else str(path))
                )

    def _warn_of_overlap(self, sources: list[DataSource]) -> None:
        times = Counter(file.absolute() for source in sources for file in source.files)
        for file in [file for file, number in times.items() if number > 1]:
            logger.warning("%s is named twice: rows to evaluate on may be among those to train on", file)

    def _plan(self, source: DataSource, option: str) -> _Plan:
        options = self.options
        first = len(self.files)
        for path in source.files:
            number = len(self.files)
            if number >= _MOST_FILES:
                raise MMToolError(f"--{option}: more than {_MOST_FILES} data files", "Join some of them.")
            file, index = self._index(path, number)
            train_file = TrainFile(
                file,
                options.dataset_format or source.format,
                {**source.columns, **(options.columns or {})},
                source.constants,
                options.media_root or source.media_root,
                self.spec.media_style,
            )
            self._check_columns(train_file)
            self.files.append(train_file)
            self.indices.append(index)
        numbers = list(range(first, len(self.files)))
        total = sum(self.files[number].file.num_rows for number in numbers)
        return _Plan(source, option, numbers, total, min(total, source.sample or total))

    def _index(self, path: Path, number: int) -> tuple[IndexedFile, Path]:
        """Return an indexed file and its index; a table's rows are copied once, to the cache folder."""
        if path.suffix.lower() != ".parquet":
            index = self.work / f"{number}.index"
            return index_file(path, index, index.with_suffix(".packed")), index
        size, modified = file_status(path)
        name = hashlib.sha256(f"{path.absolute()} {size} {modified} {_VERSION}".encode()).hexdigest()[:32]
        folder = cache_folder() / "tables"
        facts, index, packed = (folder / f"{name}{end}" for end in (".json", ".index", ".packed"))
        if not facts.exists():
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = [file.with_name(f"{file.name}.{os.getpid()}") for file in (index, packed)]
            made = index_file(path, *unfinished)
            for file, final in zip(unfinished, (index, packed), strict=True):
                file.replace(final)
            facts.write_text(json.dumps({"num_rows": made.num_rows, "first": made.first}))
        known = json.loads(facts.read_text())
        size, modified = file_status(packed)
        first = tuple(known["first"])
        return IndexedFile(path, packed, "packed", known["num_rows"], size, modified, first=first), index

    def _check_columns(self, file: TrainFile) -> None:
        FormatCheck(file.format)  # raises for an unknown name
        for old, new in file.columns.items():
            if not isinstance(new, str):
                raise MMToolError(
                    f"--columns: expected a name for {old!r}, got {new!r}", 'Write {"caption": "response"}.'
                )

    def _chosen(self, plan: _Plan, position: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Give the rows of a source, a block at a time: file, entries, and the split each goes to."""
        split = _TRAIN if plan.option == "dataset" else _EVAL
        order = Permutation(plan.total, seed_of(self.options.dataset_seed, plan.option, position))
        everything = plan.chosen == plan.total and not plan.held_out
        done = 0
        for number in plan.files:
            for block in entries(self.indices[number]):
                splits = np.full(len(block), split)
                if not everything:
                    ranks = order.block(np.arange(done, done + len(block)))
                    splits[ranks >= plan.chosen] = _SKIPPED
                    splits[ranks < plan.held_out] = _EVAL
                done += len(block)
                yield number, block, splits

    def _sampled(self, plans: list[_Plan]) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Give ``_chosen`` of every source with its position, without what --train_dataset_sample leaves out."""
        repeated = any(plan.wanted > plan.chosen - plan.held_out for plan in plans)
        limits = {_TRAIN: self.options.train_dataset_sample, _EVAL: self.options.val_dataset_sample}
        totals = {
            _TRAIN: sum(plan.chosen - plan.held_out for plan in plans if plan.option == "dataset"),
            _EVAL: sum(plan.held_out if plan.option == "dataset" else plan.chosen for plan in plans),
        }
        orders = {
            split: Permutation(totals[split], self._sample_seed(split))
            for split, limit in limits.items()
            if limit is not None and limit < totals[split] and not repeated
        }
        seen = {_TRAIN: 0, _EVAL: 0}
        for position, plan in enumerate(plans):
            for number, block, splits in self._chosen(plan, position):
                for split, order in orders.items():
                    mine = np.flatnonzero(splits == split)
                    ranks = order.block(np.arange(seen[split], seen[split] + len(mine)))
                    seen[split] += len(mine)
                    splits[mine[ranks >= limits[split]]] = _SKIPPED
                kept = splits != _SKIPPED
                yield position, number, block[kept], splits[kept]

    def _sample_seed(self, split: int) -> int:
        return seed_of(self.options.dataset_seed, "sample", SPLITS[split])

    # -- check -------------------------------------------------------------------------------------------------------

    def _write_splits(self, plans: list[_Plan]) -> tuple[CheckReport, dict[str, str]]:
        tables = {split: RowTable(self.work / f"{name}.rows", self._encoding()) for split, name in enumerate(SPLITS)}
        with (self.work / DROPPED).open("w", encoding="utf-8") as dropped:
            report = CheckReport(dropped, lambda task: self.files[task.file].file.source.place(task.number))
            write = self._write_unchecked if self.options.check_dataset == "off" else self._write_checked
            write(plans, tables, report)
        limits = {_TRAIN: self.options.train_dataset_sample, _EVAL: self.options.val_dataset_sample}
        for split, table in tables.items():
            table.close(limits[split], self._sample_seed(split))
        (self.work / DROPPED).replace(self.folder / DROPPED)
        return report, {name: tables[split].fingerprint for split, name in enumerate(SPLITS)}

    def _write_unchecked(self, plans: list[_Plan], tables: dict[int, RowTable], report: CheckReport) -> None:
        last = 0
        for position, number, block, splits in self._sampled(plans):
            if position != last:
                self._repeat(plans[last], tables, last)
                last = position
            for split, table in tables.items():
                table.add_unchecked(number, block[splits == split], self.files[number].file.size)
        self._repeat(plans[last], tables, last)

    def _write_checked(self, plans: list[_Plan], tables: dict[int, RowTable], report: CheckReport) -> None:
        waiting: deque[tuple[int, int, bytes]] = deque()  # position, split and digest of the rows being checked
        formats = FormatReader(self.files)

        def tasks() -> Iterator[tuple[Task, Row | Bad]]:
            for position, number, block, splits in self._sampled(plans):
                for (start, length, line), split in zip(block.tolist(), splits.tolist(), strict=True):
                    record, row, name = formats.read(number, start, length, line)
                    waiting.append((position, split, hashlib.blake2b(record, digest_size=16).digest()))
                    yield Task(number, start, length, line, name), row

        total = sum(plan.chosen for plan in plans)
        checker = RowChecker(self.files, self.encoder)
        last = 0
        for task, found in check_rows(tasks(), checker, self.options.dataset_num_proc):
            position, split, digest = waiting.popleft()
            while position > last:
                self._repeat(plans[last], tables, last)
                last += 1
            report.add(task, found, total)
            if isinstance(found, Measure):
                tables[split].add(task, found.tokens, digest)
        for position in range(last, len(plans)):
            self._repeat(plans[position], tables, position)

    def _repeat(self, plan: _Plan, tables: dict[int, RowTable], position: int) -> None:
        """Take rows of a source again, up to the number that was asked for; close its part of both tables."""
        main = _TRAIN if plan.option == "dataset" else _EVAL
        if plan.wanted > plan.chosen - plan.held_out:
            tables[main].repeat(plan.wanted, seed_of(self.options.dataset_seed, "repeat", plan.option, position))
        for table in tables.values():
            table.begin_part()

    # -- result ------------------------------------------------------------------------------------------------------

    def _finish(self, key: str, plans: list[_Plan], report: CheckReport, fingerprints: dict[str, str]) -> None:
        checked = self.options.check_dataset != "off"
        sizes = {name: (self.work / f"{name}.rows").stat().st_size // ROW.size for name in SPLITS}
        sets = ", ".join(f"{plan.source.name} ({plan.chosen} of {plan.total})" for plan in plans)
        lines = [f"data: {counted(sizes['train'], 'row')} to train on, {sizes['eval']} to evaluate on; from {sets}"]
        lines += report.lines() if checked else ["the rows were not checked (--check_dataset off)"]
        self._raise_where_bad(report, sizes)
        for line in lines:
            logger.log(logging.WARNING if line.startswith(("left out", "  ")) else logging.INFO, "%s", line)
        if report.reasons and not self.temporary:
            logger.warning("all of them: %s", self.folder / DROPPED)
        summary = {"train_rows": sizes["train"], "eval_rows": sizes["eval"], "check": self.options.check_dataset}
        summary["sources"] = [
            {"name": plan.source.name, "option": plan.option, "rows": plan.total, "taken": plan.chosen,
             "files": [str(file) for file in plan.source.files]}
            for plan in plans
        ]  # fmt: skip
        if checked:
            summary |= report.as_json()
        result = {
            "key": key,
            "fingerprints": fingerprints,
            "report": "\n".join(lines),
            "summary": summary,
            "files": [asdict(file) for file in self.files],
        }
        (self.folder / RESULT).unlink(missing_ok=True)  # it must never stand beside the tables of another one
        for file in [self.work / f"{name}{end}" for name in SPLITS for end in (".rows", ".lengths")]:
            file.replace(self.folder / file.name)
        unfinished = self.work / RESULT
        unfinished.write_text(json.dumps(result, ensure_ascii=False, default=str, indent=1), encoding="utf-8")
        unfinished.replace(self.folder / RESULT)

    def _raise_where_bad(self, report: CheckReport, sizes: dict[str, int]) -> None:
        """Raise for rows that --check_dataset or --truncation_strategy do not let pass, and where none is left."""
        where = "" if self.temporary else f" All of them: {self.folder / DROPPED}."
        strict = self.options.check_dataset == "strict"
        fatal = report.bad * strict + report.too_long * (self.encoder.template.truncation_strategy == "raise")
        if fatal or not sizes["train"]:
            for line in report.dropped_lines():
                logger.warning("%s", line)
        if report.bad and strict:
            place, bad = report.first_bad[0]
            more = f" (and {counted(report.bad - 1, 'more row')})" if report.bad > 1 else ""
            hint = (bad.hint or "Correct it").rstrip(".") + ", or leave such rows out with --check_dataset warn."
            raise DataError(f"{place}: {bad.reason}{more}", hint + where)
        if fatal:
            entry = report.reasons["longer than --max_length"]
            example = entry["examples"][0]
            more = f" (and {counted(entry['rows'] - 1, 'more row')})" if entry["rows"] > 1 else ""
            raise DataError(
                f"{example['row']}: {example['reason']}{more}",
                f"Raise --max_length, or pass --truncation_strategy delete.{where}",
            )
        if not sizes["train"]:
            raise DataError("no row is left to train on", f"The reasons are above.{where}")


def file_status(path: Path) -> tuple[int, int]:
    """Return size and time of change of a file.

    Raises:
        DataError: where it is not there.
    """
    try:
        found = os.stat(path)
    except OSError:
        hint = f"Name a data file ({', '.join(SUFFIXES)})."
        raise DataError(f"{path}: no such file", hint) from None
    return found.st_size, found.st_mtime_ns
