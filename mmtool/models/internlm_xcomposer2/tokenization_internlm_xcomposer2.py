"""The tokenizer of InternLM2: SentencePiece as it is, in which a space in front of a text is part of the text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.models.auto.tokenization_auto import AutoTokenizer

from mmtool.models.common.tokenization import SentencePieceTokenizer
from mmtool.models.internlm_xcomposer2.configuration_internlm_xcomposer2 import XComposer2TextConfig


class InternLM2Tokenizer(SentencePieceTokenizer):
    """The slow tokenizer of the releases; unlike Llama's, it keeps the first space of what it decodes."""

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Join pieces to text as the release does, which sets a space before a special token as well."""
        spaced = bool(tokens) and (tokens[0].startswith("▁") or tokens[0] in self.all_special_tokens)
        return " " * spaced + super().convert_tokens_to_string(tokens)


class InternLMXComposer2Tokenizer(InternLM2Tokenizer):
    """The same under the name that tokenizer_config.json of 2.0, VL and 4KHD has; in 2.5 it is the one above."""


# AutoTokenizer finds a class by that name among those registered, whichever configuration they are registered for.
AutoTokenizer.register(XComposer2TextConfig, InternLMXComposer2Tokenizer, exist_ok=True)
