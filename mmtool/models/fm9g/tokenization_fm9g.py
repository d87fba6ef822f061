"""Tokenizers of the FM9G releases: ``tokenizer.json`` as it is, a SentencePiece model (2B), a list of words (8B)."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.tokenization_python import PythonBackend
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from mmtool.errors import CheckpointError
from mmtool.models.common.folders import local_folder, read_json
from mmtool.models.common.tokenization import SentencePieceTokenizer

END_OF_TURN, END_OF_TEXT = "<|im_end|>", "</s>"
_CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_USER_AI = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<用户>' + message['content'] + '<AI>' }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
_VOCAB_FILE = "vocab.txt"
_BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


class FM9GTokenizer(TokenizersBackend):
    """The tokenizer of the 4B, 7B and 70B: ``tokenizer.json`` and its normaliser as they are, padding on the left.

    transformers' Llama tokenizer would build another normaliser, and with it other ids. ``from_pretrained`` returns the
    tokenizer of an old size where the folder holds one.
    """

    padding_side = "left"
    model_input_names = ("input_ids", "attention_mask")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Return the tokenizer of a folder or hub id; it has a chat template even where the folder has none."""
        patterns = ["*.json", "*.jinja", "tokenizer.model", _VOCAB_FILE]
        folder, kwargs = local_folder(pretrained_model_name_or_path, kwargs, patterns)
        has_json, has_model = (folder / "tokenizer.json").is_file(), (folder / "tokenizer.model").is_file()
        if has_json and not (has_model and END_OF_TURN not in added_tokens(folder)):
            tokenizer = super().from_pretrained(folder, *args, **kwargs)
        elif has_model and END_OF_TURN not in added_tokens(folder):
            tokenizer = SentencePieceTokenizer.from_pretrained(
                folder, *args, **{"special_tokens_pattern": "bos", "padding_side": "left", **kwargs}
            )
        elif (folder / _VOCAB_FILE).is_file():
            tokenizer = WordTokenizer.from_pretrained(folder, *args, **kwargs)
        else:
            raise CheckpointError(
                f"{folder} has no tokenizer.json"
                + (", and its tokenizer.model alone gives other ids than the release" if has_model else ""),
                "Copy the tokenizer's files from the release into the folder.",
            )
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _CHATML if END_OF_TURN in tokenizer.get_added_vocab() else _USER_AI
        return tokenizer

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Apply the template to messages without the white space around their contents, as the release does."""
        is_batch = isinstance(conversation, Sequence) and bool(conversation) and isinstance(conversation[0], Sequence)
        stripped = [_stripped(messages) for messages in conversation] if is_batch else _stripped(conversation)
        return super().apply_chat_template(stripped, *args, **kwargs)


class WordTokenizer(PythonBackend):
    """The tokenizer of the 8B: the longest word that fits, from the left; other characters become UTF-8 bytes.

    Nothing is done to spaces. No text becomes a special token or a byte token, however it is spelled.

    Args:
        vocab_file: ``vocab.txt``: one JSON string per line, the id of a word is the number of its line.
    """

    vocab_files_names = {"vocab_file": _VOCAB_FILE}  # noqa: RUF012
    model_input_names = ("input_ids", "attention_mask")
    padding_side = "left"

    def __init__(self, vocab_file: str | None = None, **kwargs: Any) -> None:
        if vocab_file is None:
            raise CheckpointError("an FM9G 8B tokenizer needs vocab.txt", "Copy the file from the release.")
        self.vocab_file = str(vocab_file)
        self._words = _read_words(Path(vocab_file))
        self._ids = {word: index for index, word in enumerate(self._words)}
        for name, token in (("unk_token", "<unk>"), ("bos_token", "<s>"), ("eos_token", "</s>")):
            kwargs.setdefault(name, token)
        super().__init__(**{"special_tokens_pattern": "bos", **kwargs})
        self._writable = self._ids.keys() - _BYTE_PIECES - set(self.all_special_tokens) - {""}
        # By first character, the lengths of words that start with it, longest first.
        lengths: dict[str, set[int]] = defaultdict(set)
        for word in self._writable:
            lengths[word[0]].add(len(word))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}

    @property
    def vocab_size(self) -> int:
        """How many words there are."""
        return len(self._words)

    def get_vocab(self) -> dict[str, int]:
        """Return the ids by word."""
        return {**self._ids, **self._added_tokens_encoder}

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Join words and bytes; bytes that are no UTF-8 become replacement characters."""
        data = b"".join(
            bytes([int(token[3:5], 16)]) if token in _BYTE_PIECES else token.encode("utf-8", "replace")
            for token in tokens
        )
        return data.decode("utf-8", "replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write ``vocab.txt``."""
        path = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{_VOCAB_FILE}"
        path.write_text("".join(json.dumps(word, ensure_ascii=False) + "\n" for word in self._words), "utf-8")
        return (str(path),)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        pieces, start = [], 0
        while start < len(text):
            word = self._longest(text, start)
            pieces += [word] if word else [f"<0x{byte:02X}>" for byte in text[start].encode("utf-8", "replace")]
            start += len(word) or 1
        return pieces

    def _longest(self, text: str, start: int) -> str:
        for length in self._lengths.get(text[start], ()):
            word = text[start : start + length]
            if word in self._writable:
                return word
        return ""

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._ids["<unk>"])

    def _convert_id_to_token(self, index: int) -> str:
        return self._words[index] if index < len(self._words) else self.unk_token


def added_tokens(folder: Path) -> dict[str, int]:
    """Return the ids of a folder's added tokens, from whichever file has them."""
    for name, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "added_tokens_decoder")):
        found = read_json(folder / name).get(key) if (folder / name).is_file() else None
        if isinstance(found, dict):
            return {token["content"]: int(index) for index, token in found.items()}
        if found:
            return {token["content"]: token["id"] for token in found}
    return read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}


def stop_ids(folder: Path) -> list[int]:
    """Return the ids of ``<|im_end|>`` and ``</s>``, as far as a folder's tokenizer has them as added tokens."""
    added = added_tokens(folder)
    return [added[token] for token in (END_OF_TURN, END_OF_TEXT) if token in added]


def _stripped(messages: Any) -> Any:
    return [
        {**message, "content": message["content"].strip()} if isinstance(message.get("content"), str) else message
        for message in messages
    ]


def _read_words(path: Path) -> list[str]:
    try:
        words = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}", "Copy the file from the release.") from error
    if "<unk>" not in words or not all(isinstance(word, str) for word in words):
        raise CheckpointError(f"{path} is not a list of words, one JSON string per line, with <unk> among them")
    return words
