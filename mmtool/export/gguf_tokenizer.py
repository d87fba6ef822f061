"""A tokenizer as a .gguf file holds it: pieces with scores (SentencePiece) or merges (byte-level BPE)."""

from __future__ import annotations

import json
import re
from typing import Any

from mmtool.models.common.gguf import not_representable

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"
# How text is cut before merging, by llama.cpp's name.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_CUTS = {QWEN2: "qwen2", LLAMA3: "llama-bpe"}
_GPT2 = "gpt-2"  # ByteLevel's own expression


def write_tokenizer(writer: Any, tokenizer: Any, template: Any, vocab_size: int) -> None:
    """Add a tokenizer to a file that is being written.

    Raises:
        MMToolError: for a tokenizer that llama.cpp does not have.
    """
    pieces, kinds = _pieces(tokenizer, vocab_size)
    if hasattr(tokenizer, "sp_model"):
        _write_sentencepiece(writer, tokenizer, pieces, kinds)
    elif getattr(tokenizer, "backend_tokenizer", None) is not None:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        if state["model"]["type"] != "BPE":
            raise not_representable(f"its tokenizer is a {state['model']['type']}, which llama.cpp does not have here")
        if state["model"].get("byte_fallback"):
            _write_bpe_as_pieces(writer, tokenizer, state, pieces, kinds)
        else:
            _write_byte_level(writer, state, pieces, kinds)
    else:
        raise not_representable(f"llama.cpp has no tokenizer like {type(tokenizer).__name__}")
    stops = template.stop_token_ids
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else stops[0]
    writer.add_eos_token_id(end)
    for index in stops:
        if index != end:
            writer.add_eot_token_id(index)
            break
    for name in ("bos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    starts_with_bos = tokenizer.bos_token_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id
    writer.add_add_bos_token(starts_with_bos)


def _pieces(tokenizer: Any, vocab_size: int) -> tuple[list[str], list[int]]:
    """Return the text and kind of every id; ids that the model has and the tokenizer does not are unused ones."""
    import gguf

    kind = gguf.TokenType
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    special = {index: token.special for index, token in tokenizer.added_tokens_decoder.items()}
    special |= dict.fromkeys(tokenizer.all_special_ids, True)
    pieces, kinds = [], []
    for index in range(vocab_size):
        text = texts.get(index)
        pieces.append(f"[PAD{index}]" if text is None else text)
        if text is None:
            kinds.append(kind.UNUSED)
        elif index == tokenizer.unk_token_id:
            kinds.append(kind.UNKNOWN)
        elif index in special:
            kinds.append(kind.CONTROL if special[index] else kind.USER_DEFINED)
        elif _BYTE_PIECE.fullmatch(text):
            kinds.append(kind.BYTE)
        else:
            kinds.append(kind.NORMAL)
    return pieces, [int(each) for each in kinds]


def _write_sentencepiece(writer: Any, tokenizer: Any, pieces: list[str], kinds: list[int]) -> None:
    model = tokenizer.sp_model
    known = model.get_piece_size()
    scores = [model.get_score(index) if index < known else -1000.0 for index in range(len(pieces))]
    _add_pieces(writer, pieces, kinds, scores, _prefixes(tokenizer))


def _write_bpe_as_pieces(
    writer: Any, tokenizer: Any, state: dict[str, Any], pieces: list[str], kinds: list[int]
) -> None:
    """Write a BPE with byte pieces as SentencePiece: what is merged first has the highest score."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(state["model"]["merges"]):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    scores = [-float(ranks[text]) if text in ranks else -1e6 for text in pieces]
    _add_pieces(writer, pieces, kinds, scores, _prefixes(tokenizer))


def _add_pieces(writer: Any, pieces: list[str], kinds: list[int], scores: list[float], prefixes: bool) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text.encode() for text in pieces])
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(prefixes)


def _prefixes(tokenizer: Any) -> bool:
    """Tell whether a text gets a space before it."""
    first = tokenizer.tokenize("a")[0]
    return first.startswith(_SPACE)


def _write_byte_level(writer: Any, state: dict[str, Any], pieces: list[str], kinds: list[int]) -> None:
    if state.get("normalizer"):
        raise not_representable(f"its tokenizer normalises text ({state['normalizer']['type']})")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_cut(state["pre_tokenizer"]))
    writer.add_token_list(pieces)
    writer.add_token_types(kinds)
    merges = state["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])


def _cut(state: dict[str, Any] | None) -> str:
    """Return llama.cpp's name of the way in which a text is cut before merging."""
    steps = [] if state is None else state.get("pretokenizers", [state])
    byte_level = [step for step in steps if step["type"] == "ByteLevel"]
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    if len(byte_level) == 1 and not byte_level[0]["add_prefix_space"]:
        if len(steps) == 1 and byte_level[0]["use_regex"]:
            return _GPT2
        if len(steps) == 2 and len(patterns) == 1 and patterns[0] in _CUTS and not byte_level[0]["use_regex"]:
            return _CUTS[patterns[0]]
    raise not_representable("its tokenizer cuts text in a way that llama.cpp does not have")
