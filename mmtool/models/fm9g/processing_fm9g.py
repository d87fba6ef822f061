"""The processor of the FM9G text models: the tokenizer that a release's folder holds."""

from __future__ import annotations

from mmtool.models.common.text_processor import TextProcessor


class FM9GProcessor(TextProcessor):
    """A tokenizer of one of the releases, see ``tokenization_fm9g``."""

    tokenizer_class = "mmtool.models.fm9g.tokenization_fm9g:FM9GTokenizer"
