"""The bytes of every token: for log-probabilities, and for grammars, which work on bytes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import llguidance

from mmtool.errors import MMToolError
from mmtool.models.common.tokenization import SentencePieceTokenizer


class Vocabulary:
    """A tokenizer's tokens as bytes; made when first asked for, which takes a second for a large one.

    Args:
        tokenizer: of transformers, or one of this package.
        size: rows of the model's embedding; ids from there on do not exist.
        stop_token_ids: what ends an answer.
    """

    def __init__(self, tokenizer: Any, size: int, stop_token_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.size = size
        self.stop_token_ids = tuple(stop_token_ids)
        self._lock = threading.Lock()

    @property
    def trie(self) -> llguidance.LLTokenizer:
        """The tokens as the grammar library wants them.

        Raises:
            MMToolError: for a tokenizer whose tokens have no bytes that are known.
        """
        with self._lock:
            return self._trie

    @cached_property
    def _trie(self) -> llguidance.LLTokenizer:
        if isinstance(self.tokenizer, SentencePieceTokenizer):
            wrapped = llguidance.TokenizerWrapper(_Pieces(self.tokenizer, self.stop_token_ids))
            return llguidance.LLTokenizer(wrapped, eos_token=list(self.stop_token_ids), slices=[])
        backend = getattr(self.tokenizer, "backend_tokenizer", None)  # only those of the tokenizers library have one
        if backend is None:
            raise MMToolError("the tokenizer of this model does not tell the bytes of its tokens")
        count = max(self.size, len(self.tokenizer))
        return llguidance.LLTokenizer(backend.to_str(), n_vocab=count, eos_token=list(self.stop_token_ids))

    def token(self, index: int) -> tuple[str, bytes]:
        """Return a token as text, which is not exact for a part of a character, and as bytes."""
        data = self.trie.decode_bytes([index]) if index not in self._special else self._special[index].encode()
        return data.decode("utf-8", "replace"), data

    @cached_property
    def _special(self) -> dict[int, str]:
        return {index: token.content for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}


class _Pieces:
    """A SentencePiece model as ``llguidance.TokenizerWrapper`` wants it."""

    def __init__(self, tokenizer: SentencePieceTokenizer, stop_token_ids: Sequence[int]) -> None:
        model = tokenizer.sp_model
        self.eos_token_id = stop_token_ids[0]
        self.bos_token_id = None
        self.tokens: list[bytes] = []
        self.special_token_ids: list[int] = []
        added = tokenizer.added_tokens_decoder
        for index in range(len(tokenizer)):
            if index in added or index >= model.vocab_size() or model.is_control(index) or model.is_unknown(index):
                known = added[index].content if index in added else f"<{index}>"
                self.tokens.append(known.encode())
                self.special_token_ids.append(index)
            elif model.is_byte(index):
                self.tokens.append(bytes([int(model.id_to_piece(index)[3:5], 16)]))
            else:
                self.tokens.append(model.id_to_piece(index).replace("▁", " ").encode())
        self._model = model

    def __call__(self, text: str) -> list[int]:
        return self._model.encode(text)
