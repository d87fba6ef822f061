"""What an installation brings along."""

import re
import tomllib
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = tomllib.loads(TEXT)["project"]


def closure(names: list[str]) -> set[str]:
    """All packages that an installation of ``names`` brings, extras left out."""
    seen: set[str] = set()
    queue = [canonicalize_name(name) for name in names]
    while queue:
        name = queue.pop()
        if name not in seen:
            seen.add(name)
            needed = [Requirement(line) for line in requires(name) or []]
            queue += [canonicalize_name(r.name) for r in needed if not r.marker or r.marker.evaluate({"extra": ""})]
    return seen


def test_the_base_installation_stays_small() -> None:
    base = closure([Requirement(line).name for line in PROJECT["dependencies"]])
    without_torch = base - closure(["torch"])
    ours = without_torch - closure(["transformers"])
    # torch brings nine of its own in a build for CPU, and CUDA's in others; what it shares with us counts as torch's.
    assert len(without_torch) <= 30, sorted(without_torch)
    assert len(ours) <= 6, sorted(ours)
    assert not base & {"torchvision", "torchaudio", "datasets", "pandas", "pydantic", "requests"}


def test_every_dependency_says_who_needs_it() -> None:
    for line in PROJECT["dependencies"]:
        assert re.search(rf'"{re.escape(line)}", +# \w', TEXT), line
    for extra in PROJECT["optional-dependencies"]:
        assert extra == "dev" or re.search(rf"^{extra} = \[.*\] +# \w", TEXT, re.MULTILINE), extra


def test_what_is_tested_is_inside_the_allowed_ranges() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {r.name: next(iter(r.specifier)).version for r in map(Requirement, lines[1:])}
    tested = PROJECT["optional-dependencies"]
    for line in PROJECT["dependencies"] + tested["dev"] + tested["serve"] + tested["deepspeed"] + tested["audio"]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(pins[wanted.name.replace("pyyaml", "PyYAML")]), line


def test_the_embedded_checkpoint_and_dataset_are_package_data() -> None:
    data = tomllib.loads(TEXT)["tool"]["setuptools"]["package-data"]
    assert data == {"mmtool.models.tiny": ["checkpoint/**"], "mmtool.data": ["embedded/**"]}
    embedded = ROOT / "mmtool" / "data" / "embedded"
    assert sum(file.stat().st_size for file in embedded.rglob("*") if file.is_file()) < 1_000_000
