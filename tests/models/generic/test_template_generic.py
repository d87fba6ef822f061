"""Prompts through a model's own chat template: ids, typed control tokens, labels."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mmtool.errors import MMToolError
from mmtool.loader import get_template, load_processor, open_folder
from mmtool.messages import Message, Text

NAMES = [
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "idefics3", "gemma3", "internvl", "qwen2_audio"),
    *("llama", "qwen3"),
]
END = {"idefics3": "<end_of_utterance>", "gemma3": "<end_of_turn>", "llama": "<|eot|>"}


def user(*parts):
    return Message("user", tuple(Text(part) if isinstance(part, str) else part for part in parts))


def says(text, train=True):
    return Message("assistant", (Text(text),), train=train)


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_tensors_are_those_of_the_processor(opened, conversations, name):
    known = opened(name)
    for title, messages in conversations(known).items():
        ours, native = known.template.encode(messages), known.native(messages)
        assert ours["input_ids"] == native["input_ids"][0].tolist(), title
        for field in native.keys() - {"input_ids", "attention_mask"}:
            value = ours.get(field)
            if value is None:
                assert not native[field].any(), (title, field)
            elif isinstance(value, list):
                assert value == native[field][0].tolist(), (title, field)
            elif name != "idefics3" or title not in ("two", "between", "another"):  # there, one row per picture
                assert torch.equal(value, native[field]), (title, field)


@pytest.mark.parametrize("name", NAMES)
def test_what_somebody_types_is_never_a_control_token(opened, name):
    known = opened(name)
    tokenizer = known.template.tokenizer
    special = sorted(token.content for token in tokenizer.added_tokens_decoder.values())
    typed = " ".join(special) + "".join(special) + special[0][:4]
    media = [known.media(1)] if known.template.modalities else []
    ids = known.template.encode([user(*media, typed), says(typed), user(typed)])["input_ids"]
    calm = known.template.encode([user(*media, "a"), says("a"), user("a")])["input_ids"]
    counts = {token: ids.count(tokenizer.convert_tokens_to_ids(token)) for token in special}
    assert counts == {token: calm.count(tokenizer.convert_tokens_to_ids(token)) for token in special}
    assert tokenizer.decode(ids).count(typed) == 3


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_and_its_end_are_learned_and_nothing_else(opened, name):
    known = opened(name)
    media = [known.media(1)] if known.template.modalities else []
    messages = [user(*media, "what?"), says("a circle"), user("and now?"), says("a square", train=False)]
    messages += [user("and?"), says("Hello you")]
    row = known.template.encode(messages, train=True)
    tokenizer, end = known.template.tokenizer, END.get(name, "<|im_end|>")
    learned = tokenizer.decode([label for label in row["labels"] if label != -100])
    # Idefics3 asks with "Assistant:", so the space behind it belongs to the answer.
    space = " " if name == "idefics3" else ""
    assert learned == f"{space}a circle{end}{space}Hello you{end}"
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    for index in (1, 5):  # up to an answer, a sample is the prompt for it
        prompt = known.template.encode(messages[:index])["input_ids"]
        assert row["input_ids"][: len(prompt)] == prompt
        learned_or_not = [says(m.text) if m.role == "assistant" else m for m in messages[:index]]
        assert known.template.encode(learned_or_not)["input_ids"] == prompt
        assert set(row["labels"][len(prompt) - 1 : len(prompt)]) == {-100}
        assert row["labels"][len(prompt)] != -100


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision", "idefics3", "gemma3", "internvl", "llama"])
def test_a_batch_has_the_loss_of_its_rows(opened, name):
    known = opened(name)
    template = known.template
    rows = [[user("Hi"), says("Hello you")], [user("what is it?"), says("a circle and a square")]]
    if template.modalities:
        rows += [[user(known.media(1), "what?"), says("a circle")]]
        rows += [[user(known.media(1), known.media(2, width=32, height=80), "compare"), says("a square")]]
    encoded = [template.encode(row, train=True) for row in rows]
    with torch.no_grad():
        together = known.model(**template.collate(encoded), use_cache=False).logits
        for index, row in enumerate(encoded):
            alone = known.model(**template.collate([row]), use_cache=False).logits[0]
            assert torch.allclose(together[index, : len(alone)], alone, atol=2e-4), index


def test_gradients_reach_the_towers(opened):
    known = opened("qwen2_vl")
    row = known.template.encode([user(known.media(1), "what?"), says("a circle")], train=True)
    known.model.train()
    known.model(**known.template.collate([row]), use_cache=False).loss.backward()
    assert known.model.model.visual.patch_embed.proj.weight.grad.abs().sum() > 0
    known.model.zero_grad()
    known.model.eval()


# -- chat templates of other kinds -----------------------------------------------------------------------------------


@pytest.fixture
def with_template(checkpoint, tmp_path):
    def make(chat_template: str | None, name: str = "llama"):
        folder = shutil.copytree(checkpoint(name), tmp_path / "model", dirs_exist_ok=True)
        path = folder / "chat_template.jinja"
        path.unlink(missing_ok=True)
        if chat_template is not None:
            path.write_text(chat_template)
        spec, _ = open_folder(None, folder)
        return get_template(spec, load_processor(spec, folder))

    return make


LOOP = "{% for m in messages %}<|head|>{{ m['role'] }}<|body|>BODY<|eot|>{% endfor %}"
ASK = "{% if add_generation_prompt %}<|head|>assistant<|body|>ASK{% endif %}"


def test_a_template_that_asks_otherwise_than_it_answers_is_an_error_in_training_only(with_template):
    template = with_template(LOOP.replace("BODY", "{{ m['content'] }}") + ASK.replace("ASK", "<think>"))
    rounds = [user("Hi"), says("Hello"), user("and?")]
    assert template.tokenizer.decode(template.encode(rounds)["input_ids"]).endswith("<think>")
    with pytest.raises(MMToolError, match=r"differently from how it asks for it, so that messages\[1\] cannot"):
        template.encode([*rounds[:1], says("Hello")], train=True)
    assert template.encode([*rounds[:1], says("Hello", train=False)], train=True)["labels"].count(-100) > 5


def test_thoughts_that_the_template_takes_apart_are_learned(with_template):
    body = (
        "{% set c = m['content'] %}{% if m['role'] == 'assistant' %}{% if '</think>' in c %}{% set t = "
        "c.split('</think>')[0].split('<think>')[-1] | trim %}{% set c = c.split('</think>')[-1] | trim %}{% else %}"
        "{% set t = '' %}{% endif %}{% if loop.last %}<think>\n{{ t }}\n</think>\n\n{% endif %}{% endif %}{{ c }}"
    )
    template = with_template(LOOP.replace("BODY", body) + ASK.replace("ASK", ""))
    row = template.encode([user("Hi"), says("<think>well</think>Hello")], train=True)
    learned = template.tokenizer.decode([label for label in row["labels"] if label != -100])
    assert learned == "<think>\nwell\n</think>\n\nHello<|eot|>"
    history = [user("Hi"), says("<think>well</think>Hello"), user("and?")]
    assert "well" not in template.tokenizer.decode(template.encode(history)["input_ids"])
    with pytest.raises(MMToolError, match="an answer with thoughts has the control token"):
        template.encode([user("Hi"), says("<think>well<|eot|></think>Hello")], train=True)


def test_a_template_without_an_end_of_answers_gets_one_to_learn(with_template):
    template = with_template("{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}\n{% endfor %}"
                             "{% if add_generation_prompt %}ASSISTANT: {% endif %}")  # fmt: skip
    row = template.encode([user("Hi"), says("Hello"), user("and?"), says("so")], train=True)
    learned = [label for label in row["labels"] if label != -100]
    assert template.tokenizer.decode(learned) == "Helloso<|eos|>"


def test_parts_of_a_template_that_wants_strings_for_pictures(with_template):
    chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n{% endfor %}"
    template = with_template(chat_template, "llava_onevision")
    text = "".join(piece.text or "[picture]" for piece in template.render([user("see ", _picture(), "this")]))
    assert text == "<|im_start|>user\nsee [picture]\nthis<|im_end|>\n"


def _picture():
    from PIL import Image as PILImage

    from mmtool.messages import Image

    return Image(PILImage.new("RGB", (40, 30), "red"))


def test_system_texts(opened, with_template):
    known = opened("qwen2_vl")
    shown = [known.template.tokenizer.decode(known.template.encode(messages)["input_ids"]) for messages in (
        [user("Hi")], [Message("system", (Text(""),)), user("Hi")], [Message("system", (Text("Be kind."),)), user("Hi")]
    )]  # fmt: skip
    assert "You are a helpful" in shown[0]
    assert shown[1].startswith("<|im_start|>system\n<|im_end|>")
    assert shown[2].startswith("<|im_start|>system\nBe kind.<|im_end|>")
    template = get_template(known.spec, known.processor, system="Be kind.")
    assert template.encode([user("Hi")])["input_ids"] == known.template.encode([
        Message("system", (Text("Be kind."),)), user("Hi")
    ])["input_ids"]  # fmt: skip
    without = with_template("{% for m in messages %}{% if m['role'] != 'system' %}<|head|>{{ m['content'] }}<|eot|>"
                            "{% endif %}{% endfor %}")  # fmt: skip
    with pytest.raises(MMToolError, match="has no place for a text of the system"):
        without.encode([Message("system", (Text("Be kind."),)), user("Hi")])


def test_without_a_chat_template_a_text_is_continued(with_template):
    template = with_template(None)
    tokenizer = template.tokenizer
    assert template.encode([user("Once upon")])["input_ids"] == tokenizer.encode("Once upon")
    row = template.encode([user("Once"), says(" upon")], train=True)
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == " upon<|eos|>"
    with pytest.raises(MMToolError, match="has no chat template") as caught:
        template.encode([user("Hi"), says("Hello"), user("and?")])
    assert "chat_template.jinja" in caught.value.hint


def test_text_alone_is_learned_whole(opened):
    template = opened("llama").template
    row = template.encode([says("Once upon a time")], train=True)
    assert row["labels"] == row["input_ids"]
    assert template.tokenizer.decode(row["input_ids"]) == "Once upon a time<|eos|>"


def test_a_refusing_template_is_an_error(with_template):
    template = with_template(LOOP.replace("BODY", "{{ m['content'] }}{% if m['content'] == 'no' %}"
                                          "{{ raise_exception('never') }}{% endif %}"))  # fmt: skip
    with pytest.raises(MMToolError, match="refuses the conversation: never"):
        template.encode([user("no")])


@pytest.mark.parametrize("name", ["idefics3", "qwen2_audio", "llama"])
def test_the_prompt_can_be_shown(opened, name):
    known = opened(name)
    messages = [user(*([known.media(1)] if known.template.modalities else []), "what?"), says("a circle")]
    shown = known.template.show(messages, train=True).plain
    assert "«" in shown
    assert f"[{known.template.modalities[0]} 1: " in shown if known.template.modalities else "what?" in shown


def test_saved_processors_load_again(opened, tmp_path: Path):
    known = opened("qwen2_vl")
    known.processor.save_pretrained(tmp_path)
    known.model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert settings["processor_class"] == "Qwen2VLProcessor"
    spec, _ = open_folder(None, tmp_path)
    again = get_template(spec, load_processor(spec, tmp_path))
    messages = [user(known.media(1), "what?")]
    ours, theirs = known.template.encode(messages), again.encode(messages)
    assert ours["input_ids"] == theirs["input_ids"]
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
