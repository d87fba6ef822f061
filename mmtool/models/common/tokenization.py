"""A tokenizer that is the SentencePiece model of the release and nothing else; a ``tokenizer.json`` is never read.

transformers' own LlamaTokenizer gives other ids for these models: it prepends spaces and parses control pieces that the
releases spell out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import AddedToken
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from mmtool.errors import CheckpointError
from mmtool.models.common.folders import dump_json, local_folder, read_json

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
# Where prompt layouts break first: a wrong tokenizer adds a space to these or swallows it.
_PROBES = ("###", "\n", " ")


class SentencePieceTokenizer(SentencePieceBackend):
    """The slow Llama tokenizer of the releases (``legacy``, no dummy prefix, no BOS), for transformers 5.

    Plain text becomes a special token only where the release does so: ``<unk>``, BOS and EOS typed in a text are
    parsed, control pieces are spelled out, user-defined pieces are found by the SentencePiece model. With
    ``split_special_tokens=True`` the former are spelled out as well; ``media_tokens=[piece]`` parses further pieces.
    """

    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        """Read the SentencePiece model ``vocab_file`` and check that it keeps text as it is."""
        kwargs["legacy"] = True
        try:
            super().__init__(vocab_file=vocab_file, **kwargs)
        except (OSError, RuntimeError) as error:  # what sentencepiece raises for a missing and for a broken file
            raise CheckpointError(f"{vocab_file} is not a readable SentencePiece model: {error}") from error
        self._check_probes()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Build the tokenizer of a folder from ``tokenizer.model`` and the token names of its configuration files.

        Args:
            pretrained_model_name_or_path: a folder, or a hub id.
            args: nothing; transformers' signature.
            kwargs: constructor arguments that win over the folder's, and download options.
        """
        folder, kwargs = local_folder(pretrained_model_name_or_path, kwargs, ["*.json", "tokenizer.model", "*.jinja"])
        vocab_file = folder / "tokenizer.model"
        if not vocab_file.is_file():
            raise CheckpointError(f"{folder} has no tokenizer.model", "Copy the file from the release into the folder.")
        return cls(str(vocab_file), **{**_folder_settings(folder), "name_or_path": str(folder), **kwargs})

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Write ``tokenizer.model`` and a ``tokenizer_config.json`` that the release's own code reads as well."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / "tokenizer_config.json"
        settings = read_json(path)
        for key in ("backend", "is_local", "local_files_only"):
            settings.pop(key, None)
        # Without add_prefix_space=false, transformers 5 would make its LlamaTokenizer prepend a space everywhere.
        settings |= {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_prefix_space": False}
        settings |= {"add_bos_token": False, "add_eos_token": False}
        dump_json(path, settings)
        return files

    def is_control(self, piece: str) -> bool:
        """Tell whether ``piece`` is a control piece of the vocabulary: no text can produce it."""
        index = self.sp_model.piece_to_id(piece)
        return self.sp_model.id_to_piece(index) == piece and self.sp_model.is_control(index)

    def tokenize(self, text: str, media_tokens: Collection[str] = (), **kwargs: Any) -> list[str]:
        """Return the pieces of ``text``; each of ``media_tokens`` in it stays whole."""
        if not media_tokens:
            return super().tokenize(text, **kwargs)
        pieces: list[str] = []
        for chunk in re.split(f"({'|'.join(map(re.escape, media_tokens))})", text):
            if chunk in media_tokens:
                pieces.append(chunk)
            elif chunk:
                pieces += super().tokenize(chunk, **kwargs)
        return pieces

    def _convert_id_to_token(self, index: int) -> str:
        # a model may have more rows than its tokenizer has pieces
        return super()._convert_id_to_token(index) if index < self.vocab_size else self.unk_token

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Join pieces to text as the release does: one leading space is dropped, special tokens are shown."""
        text, run = "", list[str]()
        special = set(self.all_special_tokens)
        for index, token in enumerate(tokens):
            if token in special or token in self._added_tokens_encoder:
                # as the release's slow tokenizer, which sets a space before the text that precedes a special token
                gap = " " if run and token in special else ""
                text, run = text + gap + self.sp_model.decode(run) + token, []
            else:
                run.append(token[1:] if index == 0 and token.startswith("▁") else token)
        return text + self.sp_model.decode(run)

    def _update_total_vocab_size(self) -> None:
        # the base class lists the whole vocabulary to count it, several times while loading
        self.total_vocab_size = self.vocab_size + sum(index >= self.vocab_size for index in self._added_tokens_decoder)

    def _check_probes(self) -> None:
        for probe in _PROBES:
            ids = self.sp_model.encode(probe)
            prefixed = probe[0] != " " and self.sp_model.id_to_piece(ids)[0].startswith("▁")
            kept = self.sp_model.decode(ids) == probe and not prefixed
            if not kept or self.convert_tokens_to_ids(self.tokenize(probe)) != ids:
                raise CheckpointError(
                    f"the tokenizer of {self.vocab_file} does not keep {probe!r} as it is",
                    "Take tokenizer.model and tokenizer_config.json from the release.",
                )


def _folder_settings(folder: Path) -> dict[str, Any]:
    """Return the constructor arguments that ``tokenizer_config.json`` and ``special_tokens_map.json`` hold."""
    config = {**_read(folder / "special_tokens_map.json"), **_read(folder / "tokenizer_config.json")}
    settings: dict[str, Any] = {
        key: config[key] for key in ("model_max_length", "padding_side", "chat_template") if config.get(key) is not None
    }
    added = config.get("added_tokens_decoder") or {}
    settings["added_tokens_decoder"] = {int(index): _added_token(token) for index, token in added.items()}
    by_text = {token.content: token for token in settings["added_tokens_decoder"].values()}
    for key in _SPECIAL_TOKENS:
        if config.get(key) is not None:
            token = _added_token(config[key])
            settings[key] = by_text.get(token.content, token)
    return settings


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _added_token(token: str | dict[str, Any]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, lstrip=False, rstrip=False, normalized=True, special=True)
    return AddedToken(**{"special": True, **{key: value for key, value in token.items() if key != "__type"}})
