"""The tokenizer of FM9G4B-V: ``tokenizer.json`` and nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_tokenizers import TokenizersBackend

from mmtool.errors import CheckpointError
from mmtool.models.common.folders import dump_json, local_folder, read_json

END_OF_TURN = "<|im_end|>"
# What transformers writes about how a tokenizer was loaded, and the release's code, which a folder need not hold.
_INTERNAL_KEYS = ("auto_map", "backend", "is_local", "local_files_only")


class FM9GVTokenizer(TokenizersBackend):
    """``tokenizer.json`` with its normaliser as it is, padding on the left.

    The normaliser puts a ``▁`` in front of every stretch of text between special tokens. transformers' Llama tokenizer
    would build another one, and ``tokenizer.model`` asks for none: both give other ids than the release.
    """

    padding_side = "left"
    model_input_names = ("input_ids", "attention_mask")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Return the tokenizer of a folder or hub id."""
        folder, kwargs = local_folder(pretrained_model_name_or_path, kwargs, ["*.json", "*.jinja"])
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer.json, and tokenizer.model alone gives other ids than the release",
                "Copy the file from the release into the folder.",
            )
        return super().from_pretrained(folder, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Write ``tokenizer.json`` and a ``tokenizer_config.json`` that any transformers reads without other code."""
        files = super().save_pretrained(save_directory, *args, **{"save_jinja_files": False, **kwargs})
        path = Path(save_directory) / "tokenizer_config.json"
        settings = {key: value for key, value in read_json(path).items() if key not in _INTERNAL_KEYS}
        if isinstance(special := settings.pop("extra_special_tokens", None), list):
            settings["additional_special_tokens"] = special  # the name before transformers 5
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": self.padding_side}
        dump_json(path, settings)
        return files


def end_of_turn_id(folder: Path) -> int | None:
    """Return the id of ``<|im_end|>`` in a folder's tokenizer; None without one."""
    if not (folder / "tokenizer.json").is_file():
        return None
    tokens = read_json(folder / "tokenizer.json").get("added_tokens") or ()
    return next((token["id"] for token in tokens if token["content"] == END_OF_TURN), None)
