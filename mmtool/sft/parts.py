"""Which parts of a model train, and how: chosen from the options, applied to the network, shown as a table."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from mmtool.errors import MMToolError
from mmtool.groups.sft import PartArgs

Way = Literal["frozen", "lora", "full"]
OTHER = "other"  # parameters that no part claims; they stay as they are unless asked for by name
PROJECTORS = ("vision_proj", "audio_proj")
_LORA = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.")  # some networks have a lora_* themselves
_REGEX_SIGNS = re.compile(r"[\\^$*+?{}\[\]|()]")


def choose_ways(given: PartArgs, sft_type: str, parts: Mapping[str, tuple[str, ...]]) -> dict[str, Way]:
    """Return how each part of a family trains.

    ``true`` means the way of ``sft_type``, but for projectors always ``full``: they are small, and low ranks suit them
    badly. By default the language model trains, and with ``full`` the projectors do, too; towers are frozen.

    Raises:
        MMToolError: for a part that the model does not have, or where nothing would train.
    """
    ways: dict[str, Way] = {}
    for part in parts:
        default = "true" if part == "llm" or (part in PROJECTORS and sft_type == "full") else "false"
        chosen = getattr(given, f"tune_{part}") or default
        true: Way = "full" if part in PROJECTORS else sft_type  # type: ignore[assignment]
        ways[part] = {"true": true, "false": "frozen"}.get(chosen, chosen)  # type: ignore[assignment]
    for part in ("llm", "vision_encoder", "vision_proj", "audio_encoder", "audio_proj"):
        asked = getattr(given, f"tune_{part}")
        if part not in parts and asked not in (None, "false"):
            raise MMToolError(
                f"--tune_{part} {asked}: this model has no such part", f"It has {', '.join(parts)}; leave it out."
            )
    if sft_type == "full" and "lora" in ways.values():
        part = next(part for part, way in ways.items() if way == "lora")
        raise MMToolError(
            f"--tune_{part} lora needs --sft_type lora",
            "With it, --tune_llm full and so on train other parts as a whole beside the adapters.",
        )
    if set(ways.values()) == {"frozen"} and not given.additional_trainable_parameters:
        raise MMToolError("nothing would be trained: every part is frozen", "Set one of the --tune_ options to true.")
    return ways


class PartNames:
    """Tells the part of a module or parameter by its name; the longest matching prefix wins."""

    def __init__(self, parts: Mapping[str, tuple[str, ...]]) -> None:
        pairs = [(prefix, part) for part, prefixes in parts.items() for prefix in prefixes]
        self._prefixes = sorted(pairs, key=lambda pair: len(pair[0]), reverse=True)

    def __call__(self, name: str) -> str:
        """Return the part, ``other`` for none."""
        for prefix, part in self._prefixes:
            if name == prefix or name.startswith(f"{prefix}."):
                return part
        return OTHER


def matches_name(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a name begins with one of the patterns (at a dot), or is matched whole by one as an expression."""
    return any(
        name == pattern
        or name.startswith(pattern if pattern.endswith(".") else f"{pattern}.")
        or (_REGEX_SIGNS.search(pattern) is not None and _fullmatch(pattern, name))
        for pattern in patterns
    )


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise MMToolError(f"{pattern!r} is no regular expression: {error}", "Write it as Python's re does.") from error


def set_trainable(model: nn.Module, ways: Mapping[str, Way], part_of: PartNames, given: PartArgs) -> None:
    """Set ``requires_grad`` of every parameter of a model without adapters: true where its part trains as a whole.

    What a network itself does not train, such as paths for tasks that are switched off, stays frozen.
    """
    check_patterns(model, given)
    for name, parameter in model.named_parameters():
        trains = ways.get(part_of(name)) == "full" and not matches_name(name, given.freeze_parameters)
        trains = trains and parameter.requires_grad
        trains = trains or matches_name(name, given.additional_trainable_parameters)
        parameter.requires_grad_(trains and parameter.is_floating_point())


def check_patterns(model: nn.Module, given: PartArgs) -> None:
    """Refuse a pattern that fits no parameter: it is a slip of the pen."""
    names = [name for name, _ in model.named_parameters()]
    for option in ("freeze_parameters", "additional_trainable_parameters"):
        for pattern in getattr(given, option):
            if not any(matches_name(name, [pattern]) for name in names):
                raise MMToolError(
                    f"--{option} {pattern} fits no parameter of the model",
                    f"Names look like {names[0]} and {names[-1]}.",
                )


@dataclass(frozen=True)
class PartRow:
    """A line of the table: a part, how it trains, and its numbers of parameters."""

    part: str
    way: str
    trained: int
    total: int


def count_parts(model: nn.Module, part_of: PartNames, base_prefix: str = "") -> list[PartRow]:
    """Return a row per part that has parameters; adapters count for the part they sit in.

    Args:
        model: the network as it trains; parameters that ZeRO-3 has partitioned, or that are packed into 4 bits, count
            whole.
        part_of: tells parts.
        base_prefix: what stands before the names in ``part_of``, as peft puts it there.
    """
    counts: dict[str, list[int]] = {}
    adapters: dict[str, bool] = {}
    for name, parameter in model.named_parameters():
        plain = name.removeprefix(base_prefix)
        part = part_of(plain)
        if ".original_module." in plain:
            continue  # the frozen twin of a module that trains as a whole
        numel = _numel(parameter)
        entry = counts.setdefault(part, [0, 0])
        entry[1] += numel
        if parameter.requires_grad:
            entry[0] += numel
            adapters[part] = adapters.get(part, False) or _LORA.search(plain) is not None
    rows = []
    for part, (trained, total) in counts.items():
        way = "frozen" if not trained else "lora" if adapters[part] else "full" if trained == total else "partly"
        rows.append(PartRow(part, way, trained, total))
    return rows


def _numel(parameter: nn.Parameter) -> int:
    packed = getattr(parameter, "quant_state", None)  # of bitsandbytes: two weights in a byte
    if packed is not None:
        return math.prod(packed.shape)
    return getattr(parameter, "ds_numel", parameter.numel())


def format_table(rows: Sequence[PartRow]) -> str:
    """Return the table as text: part, how it trains, trained parameters, all parameters, share."""
    whole = PartRow("total", "", sum(row.trained for row in rows), sum(row.total for row in rows))
    cells = [("part", "trains", "trained", "parameters", "share")]
    for row in (*rows, whole):
        share = f"{100 * row.trained / row.total:.2f} %" if row.total else ""
        cells.append((row.part, row.way, f"{row.trained:,}", f"{row.total:,}", share))
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def parts_summary(rows: Sequence[PartRow]) -> dict[str, Any]:
    """Return the table as data."""
    return {row.part: {"trains": row.way, "trained": row.trained, "parameters": row.total} for row in rows}
