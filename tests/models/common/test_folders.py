"""What a copy of a model folder takes along."""

import re
from pathlib import Path

from mmtool.models.common.folders import copy_beside_weights


def test_other_files_of_a_model_come_along(tmp_path: Path) -> None:
    source, target = tmp_path / "base", tmp_path / "new"
    wanted = ("tokenizer.model", "config.json", "vit/x/config.json")
    weights = ("model.safetensors", "vit/x/pytorch_model.bin", "model.safetensors.index.json", "training_args.bin")
    others = ("modeling.py", "README.md", ".git/config", "checkpoint-5/config.json", "global_step5/states")
    for name in (*wanted, *weights, *others):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("base")
    target.mkdir()
    (target / "config.json").write_text("trained")
    copy_beside_weights(source, target, re.compile(r".*\.py|README.*"))
    found = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert found == {"tokenizer.model": "base", "config.json": "trained", "vit/x/config.json": "base"}
