"""The special tokens of a Megrez folder: which string plays which part, and which id it has.

The prompt pieces of the Omni release are named in its configuration files, so nothing here is fixed but the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtool.errors import CheckpointError
from mmtool.models.common.folders import read_json

# By part: the keys under which preprocessor_config.json and tokenizer_config.json may name it, then the usual string.
_NAMES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "feature": (("unk", "unk_token"), "<|unk|>"),
    "image_start": (("im_start", "image_start", "image_start_token"), "<|image_start|>"),
    "image_end": (("im_end", "image_end", "image_end_token"), "<|image_end|>"),
    "slice_start": (("slice_start", "slice_start_token"), "<|slice_start|>"),
    "slice_end": (("slice_end", "slice_end_token"), "<|slice_end|>"),
    "audio_start": (("audio_start", "audio_start_token"), "<|audio_start|>"),
    "audio_end": (("audio_end", "audio_end_token"), "<|audio_end|>"),
    "image": (("image_pad", "image_token"), "<|image_pad|>"),
    "audio": (("audio_pad", "audio_token"), "<|audio_pad|>"),
    "end_of_text": ((), "<|eos|>"),
}
# Ids of the release's text base. It has no slice tokens; here they follow its last token.
DEFAULT_IDS: Mapping[str, int] = {
    **{"feature": 120001, "image_start": 120014, "image_end": 120015, "slice_start": 120026, "slice_end": 120027},
    **{"audio_start": 120020, "audio_end": 120021, "image": 120016, "audio": 120022, "end_of_text": 120000},
}
_SPARE = ("image", "audio", "end_of_text")  # parts that no prompt of ours needs
_FILES = ("preprocessor_config.json", "tokenizer_config.json")


def usual_texts() -> dict[str, str]:
    """Return the string of every part where no file names another."""
    return {part: default for part, (_, default) in _NAMES.items()}


def token_texts(folder: Path) -> dict[str, str]:
    """Return the string of every part, from the configuration files of a folder or else the usual ones."""
    settings = [read_json(folder / name) if (folder / name).is_file() else {} for name in _FILES]
    return {part: _named(keys, settings) or default for part, (keys, default) in _NAMES.items()}


def token_ids(folder: Path) -> dict[str, int] | None:
    """Return the id of every part in a folder's tokenizer, None where the folder has no tokenizer.

    Raises:
        CheckpointError: for a string that is not one token.
    """
    known = _added_tokens(folder)
    if known is None:
        return None
    texts = token_texts(folder)
    for part, text in texts.items():
        if text not in known and part not in _SPARE:
            raise CheckpointError(
                f"{folder}: {text!r}, which stands for {part!r} in the prompts, is not one token of its tokenizer",
                "Take tokenizer.json, tokenizer_config.json and preprocessor_config.json from one release.",
            )
    return {part: known[text] for part, text in texts.items() if text in known}


def _named(keys: tuple[str, ...], settings: list[dict[str, Any]]) -> str | None:
    for found in (values[key] for values in settings for key in keys if key in values):
        text = found.get("content") if isinstance(found, Mapping) else found
        if isinstance(text, str) and text:
            return text
    return None


def _added_tokens(folder: Path) -> dict[str, int] | None:
    """Return the ids of all tokens that are found whole in a text; None without tokenizer files."""
    path = folder / "tokenizer_config.json"
    if path.is_file() and (listed := read_json(path).get("added_tokens_decoder")):
        return {token["content"]: int(index) for index, token in listed.items()}
    path = folder / "tokenizer.json"
    if path.is_file():
        return {token["content"]: token["id"] for token in read_json(path)["added_tokens"]}
    return None
