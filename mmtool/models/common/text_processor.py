"""The processor of a model that takes text only: its tokenizer, under the name that templates and the loader expect."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from mmtool.utils import import_object


class TextProcessor:
    """Holds a tokenizer; a family names the class of its own.

    Args:
        tokenizer: of ``tokenizer_class``.
    """

    # Import path ``package.module:Name`` of a class with ``from_pretrained``.
    tokenizer_class: ClassVar[str] = "transformers:PreTrainedTokenizerFast"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *, tokenizer: Any = None) -> TextProcessor:
        """Return the processor of a folder; ``tokenizer`` is read from it if None."""
        if tokenizer is None:
            tokenizer = import_object(cls.tokenizer_class).from_pretrained(folder)
        return cls(tokenizer)

    def save_pretrained(self, folder: str | os.PathLike, **kwargs: Any) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder, **kwargs)
