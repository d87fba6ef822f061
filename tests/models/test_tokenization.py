"""The tokenizer against recorded ids of the release's slow tokenizer, and the tokenizers that must be refused."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from mmtool.errors import CheckpointError
from mmtool.models.common.tokenization import SentencePieceTokenizer

PLACEHOLDER = "<|reserved003|>"


def cases(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def real(checkpoint: Path, real_tokenizer: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer of the released models."""
    folder = tmp_path_factory.mktemp("real")
    for path in (real_tokenizer("yi") / "tokenizer.model", checkpoint / "tokenizer_config.json"):
        shutil.copyfile(path, folder / path.name)
    return folder


def test_text_becomes_the_recorded_ids_and_back(yi_vl: Path, tokenizer: SentencePieceTokenizer) -> None:
    recorded = cases(yi_vl, "tokenizer_cases.json")
    for case in recorded["encode"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
    for case in recorded["encode"] + recorded["decode"]:
        assert tokenizer.decode(case["ids"]) == case["decode"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decode_skip_special"]
    info = recorded["info"]
    assert len(tokenizer) == info["len"]
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert special == (info["bos_id"], info["eos_id"], info["pad_id"], info["unk_id"])


def test_the_real_tokenizer_gives_the_recorded_ids(yi_vl: Path, real: Path) -> None:
    recorded = cases(yi_vl, "real_tokenizer_cases.json")
    tokenizer = SentencePieceTokenizer.from_pretrained(real)
    assert len(tokenizer) == 64000
    for case in recorded["encode"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decode"]
    for text, index in recorded["probes"].items():
        assert tokenizer.encode(text) == [index]
    for prompt in recorded["prompts"]:
        chunks = prompt["prompt_text"].split("<image_placeholder>")
        ids = [token for chunk in chunks for token in (*tokenizer.encode(chunk), -200)]
        assert ids[:-1] == prompt["input_ids"]


def test_only_what_the_release_parses_becomes_special(tokenizer: SentencePieceTokenizer) -> None:
    assert tokenizer.encode("<unk><|startoftext|><|endoftext|>") == [0, 1, 2]
    for text in ("<|Human|>", PLACEHOLDER, "<|System|>"):
        assert not {*range(6), *range(9, 14)} & set(tokenizer.encode(text)), text
    assert tokenizer.encode("<|im_end|>") == [7], "a user-defined piece: the SentencePiece model finds it"
    assert tokenizer.encode(f"a{PLACEHOLDER}b", media_tokens=[PLACEHOLDER]) == [940, 9, 957]


def test_split_special_tokens_keeps_all_text_plain(tokenizer: SentencePieceTokenizer) -> None:
    text = f"a<unk><|startoftext|><|endoftext|>{PLACEHOLDER}b"
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert not set(range(14)) & set(ids)
    assert tokenizer.decode(ids) == text


def test_saving_keeps_the_tokenizer(yi_vl: Path, tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == Path(tokenizer.vocab_file).read_bytes()
    settings = cases(tmp_path, "tokenizer_config.json")
    assert (settings["tokenizer_class"], settings["add_bos_token"], settings["legacy"]) == (
        "LlamaTokenizer",
        False,
        True,
    )
    again = SentencePieceTokenizer.from_pretrained(tmp_path)
    copy = pickle.loads(pickle.dumps(tokenizer))
    for case in cases(yi_vl, "tokenizer_cases.json")["encode"]:
        assert again.encode(case["text"]) == copy.encode(case["text"]) == case["ids"]
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.model_max_length == 4096


def test_a_tokenizer_json_beside_it_is_not_read(release: Path, tokenizer: SentencePieceTokenizer) -> None:
    (release / "tokenizer.json").write_text('{"added_tokens": [{"id": 3, "content": "<|Human|>", "special": true}]}')
    again = SentencePieceTokenizer.from_pretrained(release)
    assert again.encode("<|Human|> ###") == tokenizer.encode("<|Human|> ###")


def test_without_configuration_files_the_pieces_are_the_same(release: Path, tokenizer: SentencePieceTokenizer) -> None:
    (release / "tokenizer_config.json").unlink()
    again = SentencePieceTokenizer.from_pretrained(release)
    assert again.special_tokens_map == tokenizer.special_tokens_map


def train(folder: Path, **settings: object) -> None:
    text = folder / "text.txt"
    text.write_text("### Human: what is this?\n### Assistant: a cat and a dog\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe", byte_fallback=True,
        minloglevel=2, hard_vocab_limit=False, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("settings", [{"add_dummy_prefix": True}, {"remove_extra_whitespaces": True}])
def test_a_tokenizer_that_changes_text_is_refused(tmp_path: Path, settings: dict) -> None:
    good = {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
    train(tmp_path, **{**good, **settings})
    with pytest.raises(CheckpointError, match="does not keep"):
        SentencePieceTokenizer.from_pretrained(tmp_path)


def test_added_tokens_that_change_a_prompt_are_refused(release: Path) -> None:
    path = release / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["added_tokens_decoder"]["1088"] = {"content": "###", "special": False}
    path.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="does not keep '###'"):
        SentencePieceTokenizer.from_pretrained(release)


@pytest.mark.parametrize("content", [None, b"", b"no model"])
def test_a_missing_or_broken_model_file_is_an_error(release: Path, content: bytes | None) -> None:
    path = release / "tokenizer.model"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        SentencePieceTokenizer.from_pretrained(release)
