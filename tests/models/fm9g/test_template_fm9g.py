"""The FM9G chat formats and tokenizers against the reference: prompt text, ids, labels, what is typed, old sizes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from mmtool.auto import install
from mmtool.errors import CheckpointError, MMToolError
from mmtool.messages import Image, to_messages
from mmtool.models.common.tokenization import SentencePieceTokenizer
from mmtool.models.fm9g.modeling_fm9g import FM9GForCausalLM, FM9GModel
from mmtool.models.fm9g.processing_fm9g import FM9GProcessor
from mmtool.models.fm9g.template import FM9GOldTemplate, FM9GTemplate
from mmtool.models.fm9g.tokenization_fm9g import FM9GTokenizer, WordTokenizer

install()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def rows_of(case, expected):
    """Return messages and expectations of a case, padding taken away; a batch case has several."""
    pairs = zip(case["batch"], expected["rows"], strict=True) if "batch" in case else [(case, expected)]
    for given, wanted in pairs:
        mask = wanted.get("attention_mask", [1] * len(wanted["input_ids"]))
        ids = [index for index, keep in zip(wanted["input_ids"], mask, strict=True) if keep]
        yield given["messages"], {**wanted, "input_ids": ids}


def text_of(template, messages, train=False):
    return "".join(piece.text for piece in template.render(messages, train))


# -- ChatML


def test_prompt_text_ids_and_labels_are_those_of_the_reference(template, cases):
    for name, case, expected, _ in cases():
        # The system template of the reference's fine-tuning names the role User, which no prompt does.
        if name == "train_system_template":
            continue
        for messages, wanted in rows_of(case, expected):
            train = "labels" in wanted
            text = wanted["prompt_text"] + wanted.get("response_text", "")
            assert text_of(template, messages, train) == text, name
            encoded = template.encode(messages, train)
            if not name.startswith("inject"):
                assert encoded["input_ids"] == wanted["input_ids"], name
                assert encoded.get("labels") == wanted.get("labels"), name


def test_a_typed_control_token_stays_text_unlike_in_the_reference(template, cases):
    # The records of the inject cases are informational: there, what is typed becomes a control token.
    for name, case, expected, _ in cases("inject"):
        ids = template.encode(case["messages"])["input_ids"]
        assert ids != expected["input_ids"], name
        assert (ids.count(901), ids.count(900)) == (2, 1), name  # of the chat format alone
        assert 2 not in ids and 0 not in ids and ids.count(1) == 1, name
        assert template.tokenizer.decode(ids, skip_special_tokens=False).count("<|im_start|>") >= 2, name


def test_the_system_option_equals_a_system_message(processor):
    question = user("hello")
    option = FM9GTemplate(processor, system=" be brief ").encode([question])
    message = FM9GTemplate(processor).encode([{"role": "system", "content": "be brief"}, question])
    assert option["input_ids"] == message["input_ids"]


def test_every_answer_of_a_conversation_is_learned_and_its_ids_are_those_of_the_prompts(template):
    messages = [user(" one "), assistant(" two "), user("three"), assistant(" four\n")]
    sample = template.encode(messages, train=True)
    labels = [-100] * len(sample["input_ids"])
    for index, text in ((1, "two"), (3, " four\n")):  # the last answer is learned as it is
        start = len(template.encode(messages[:index])["input_ids"])
        assert sample["input_ids"][:start] == template.encode(messages[:index])["input_ids"]
        learned = [*template.text_ids("\n" + text)[2:], 900]  # without the ▁ and the newline
        labels[start : start + len(learned)] = learned
    assert sample["labels"] == labels
    assert sample["input_ids"][-1] == 900  # no newline behind


def test_an_answer_that_is_not_learned_leaves_the_ids_as_they_are(template):
    messages = to_messages([user("one"), assistant("two"), user("three"), assistant("four")])
    skipping = [messages[0], replace(messages[1], train=False), *messages[2:]]
    one, other = template.encode(skipping, train=True), template.encode(messages, train=True)
    assert one["input_ids"] == other["input_ids"]
    assert sum(label != -100 for label in one["labels"]) < sum(label != -100 for label in other["labels"])


def test_stop_tokens_are_the_ends_of_turn_and_text(template):
    assert template.stop_token_ids == (900, 2)


def test_pictures_are_refused(template):
    with pytest.raises(MMToolError, match="takes text, not image"):
        template.encode([{"role": "user", "content": [Image("x.png")]}])


def test_a_batch_is_padded_on_the_left_with_the_end_of_turn(template, cases):
    ((_, case, expected, _),) = cases("batch_left_pad")
    batch = template.collate([template.encode(row["messages"]) for row in case["batch"]])
    assert batch["input_ids"].tolist() == [row["input_ids"] for row in expected["rows"]]
    assert batch["attention_mask"].tolist() == [row["attention_mask"] for row in expected["rows"]]


# -- the tokenizer of the 4B, 7B and 70B


def test_tokenizer_json_is_used_as_it_is(golden):
    tokenizer = FM9GTokenizer.from_pretrained(golden("fm9g/gqa") / "checkpoint")
    for row in json.loads((golden("fm9g") / "tokenizer_cases.json").read_text("utf-8"))["rows"]:
        assert tokenizer(row["text"])["input_ids"] == row["ids"]
        assert tokenizer.decode(row["ids"]) == row["decoded"]
        assert tokenizer.decode(row["ids"], skip_special_tokens=True) == row["decoded_skip_special"]
    assert tokenizer.padding_side == "left" and tokenizer.pad_token is None


def test_the_release_s_own_lines_run_without_its_code(checkpoint, cases):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    assert (type(tokenizer), type(model)) == (FM9GTokenizer, FM9GForCausalLM)
    assert type(AutoModel.from_pretrained(checkpoint)) is FM9GModel
    for name, case, expected, _ in cases():
        if "labels" in expected or "rows" in expected or name == "long_prompt":
            continue
        messages = [{**m, "content": "".join(part["text"] for part in m["content"])} for m in case["messages"]]
        prompt = tokenizer.apply_chat_template(conversation=messages, add_generation_prompt=True, tokenize=False)
        assert prompt == expected["prompt_text"], name
        inputs = tokenizer(prompt, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == expected["input_ids"], name  # the inject cases too
        answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer.tolist() == expected["generated_ids"], name
        assert tokenizer.decode(answer, skip_special_tokens=True).strip() == expected["generated_text"], name


def test_a_saved_tokenizer_gives_the_same_ids(checkpoint, golden, tmp_path):
    FM9GProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path)
    one, other = (FM9GTokenizer.from_pretrained(folder) for folder in (checkpoint, tmp_path))
    for row in json.loads((golden("fm9g") / "tokenizer_cases.json").read_text("utf-8"))["rows"]:
        assert other(row["text"])["input_ids"] == one(row["text"])["input_ids"]
    messages = [user(" a "), assistant("b"), user("c")]
    assert other.apply_chat_template(messages, tokenize=False) == one.apply_chat_template(messages, tokenize=False)
    assert (other.padding_side, other.eos_token, other.pad_token) == ("left", "<|im_end|>", None)


def test_a_batch_of_conversations_is_stripped_too(processor):
    rows = processor.tokenizer.apply_chat_template([[user(" a ")], [user("b\n")]], tokenize=False)
    assert rows == [f"<|im_start|>user\n{text}<|im_end|>\n" for text in "ab"]


def test_a_folder_without_chat_template_gets_one(release):
    path = release / "tokenizer_config.json"
    config = json.loads(path.read_text())
    wanted = FM9GTokenizer.from_pretrained(release).chat_template
    del config["chat_template"]
    path.write_text(json.dumps(config))
    assert FM9GTokenizer.from_pretrained(release).chat_template == wanted


def test_a_sentencepiece_model_alone_is_refused(release):
    (release / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        FM9GTokenizer.from_pretrained(release)


# -- the sizes of 2024

WORDS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS += ["<用户>", "<AI>", "a", "b", "ab", "abc", " ", "  ", "\n", "你", "你好", "好吗", '"', "\\", " a"]


@pytest.fixture
def words(tmp_path):
    """A folder with the 8B's kind of vocabulary."""
    text = "".join(json.dumps(word, ensure_ascii=index % 2 == 0) + "\n" for index, word in enumerate(WORDS))
    (tmp_path / "vocab.txt").write_text(text, "utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("abcab", ["abc", "ab"]),
        ("aab", ["a", "ab"]),
        ("你好吗", ["你好", "<0xE5>", "<0x90>", "<0x97>"]),  # from the left, even if the rest fits worse
        ("a   a", ["a", "  ", " a"]),
        ("\n\n", ["\n", "\n"]),
        ("z", ["<0x7A>"]),
        ("<s></s><unk>", [*(f"<0x{ord(c):02X}>" for c in "<s></s><unk>")]),
        ("<0x41>", [*(f"<0x{ord(c):02X}>" for c in "<0x41>")]),
        ("<用户>ab<AI>", ["<用户>", "ab", "<AI>"]),
        ('"\\', ['"', "\\"]),
    ],
)
def test_the_longest_word_from_the_left(words, text, pieces):
    tokenizer = FM9GTokenizer.from_pretrained(words)
    assert type(tokenizer) is WordTokenizer
    if "<s>" in text:  # the texts of special tokens: for transformers' own calls they may be meant
        pieces = [piece for piece in pieces if piece in WORDS]
        assert tokenizer.tokenize(text, split_special_tokens=True) == pieces
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert ids == [WORDS.index(piece) for piece in pieces]
    assert tokenizer.decode(ids) == text


def test_words_are_saved_as_they_were(words, tmp_path):
    tokenizer = FM9GTokenizer.from_pretrained(words)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = FM9GTokenizer.from_pretrained(tmp_path / "saved")
    assert (again.get_vocab(), again.encode("你好 ab")) == (tokenizer.get_vocab(), tokenizer.encode("你好 ab"))
    assert again.encode("a") == [1, WORDS.index("a")]  # BOS in front
    assert again.decode([1, *again.encode("ab", add_special_tokens=False), 2], skip_special_tokens=True) == "ab"


def test_a_vocabulary_that_is_none_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text('"a"\nb\n')
    with pytest.raises(CheckpointError, match=r"vocab\.txt"):
        FM9GTokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text('"a"\n"b"\n')
    with pytest.raises(CheckpointError, match="list of words"):
        FM9GTokenizer.from_pretrained(tmp_path)


@pytest.fixture
def old(words):
    return FM9GOldTemplate(FM9GProcessor.from_pretrained(words))


def test_the_old_prompt_has_nothing_between_the_turns(old):
    messages = [user("a"), assistant("b"), user("ab")]
    assert text_of(old, messages) == "<用户>a<AI>b<用户>ab<AI>"
    ids = [WORDS.index(word) for word in ("<s>", "<用户>", "a", "<AI>", "b", "<用户>", "ab", "<AI>")]
    assert old.encode(messages)["input_ids"] == ids
    tokenizer = old.tokenizer
    assert tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False)) == ids
    assert old.stop_token_ids == (2,)


def test_old_training_learns_all_answers_and_the_last_end(old):
    sample = old.encode([user("a"), assistant("b"), user("ab"), assistant("abc")], train=True)
    assert text_of(old, [user("a"), assistant("b")], train=True) == "<用户>a<AI>b</s>"
    learned = [WORDS[label] for label in sample["labels"] if label != -100]
    assert learned == ["b", "abc", "</s>"]
    assert sample["input_ids"][-1] == 2 and sample["input_ids"].count(2) == 1
    plain = old.encode([assistant("ab")], train=True)
    assert [WORDS[index] for index in plain["input_ids"]] == ["<s>", "ab", "</s>"]
    assert plain["labels"] == [-100, *plain["input_ids"][1:]]


def test_the_2b_takes_its_sentencepiece_model(real_tokenizer, tmp_path):
    # Another family's model of the same kind: no dummy prefix, bytes for what is not in it.
    shutil.copy(real_tokenizer("yi") / "tokenizer.model", tmp_path)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokens = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **tokens}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": []}))  # not read: it prepends spaces
    tokenizer = FM9GTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is SentencePieceTokenizer
    pieces = tokenizer.sp_model.encode("<用户>hello<AI>")
    assert tokenizer.encode(tokenizer.apply_chat_template([user("hello")], tokenize=False)) == [1, *pieces]


def test_positions_of_a_collated_batch_run(load, template):
    batch = template.collate([template.encode([user(text)]) for text in ("你是谁？", "a")])
    with torch.no_grad():
        assert load("sdpa")(**batch).logits.shape[:2] == batch["input_ids"].shape
