"""The chat formats of the InternLM-XComposer2 family: what golden cases do not show."""

from typing import Any

import pytest

from mmtool.errors import MMToolError
from mmtool.messages import conversation
from mmtool.models.internlm_xcomposer2 import template as templates
from mmtool.models.internlm_xcomposer2.processing_internlm_xcomposer2 import XComposer2Processor

IMAGE = 258


def shown(template: Any, messages: list, train: bool = False) -> str:
    return "".join("<IMG>" if piece.media else piece.text for piece in template.render(messages, train))


def user(*parts: Any) -> dict:
    """A question of texts and, for None, pictures."""
    as_part = {None: {"type": "image", "image": "x.png"}}
    return {"role": "user", "content": [as_part.get(part, {"type": "text", "text": part}) for part in parts]}


def assistant(text: str, **fields: Any) -> dict:
    return {"role": "assistant", "content": text, **fields}


def test_the_default_systems_are_those_of_the_releases(plain: Any, hd: Any, tiled: Any) -> None:
    short = plain.case("text_default_meta")[0]["messages"][0]["content"][0]["text"]
    long = tiled.case("text_default_meta")[0]["messages"][0]["content"][0]["text"]
    assert templates.XComposer2Template(plain.processor).system == short
    assert templates.XComposer2VLTemplate(plain.processor).system == long
    assert templates.XComposer24KHDTemplate(hd.processor).system == long
    assert templates.XComposer25Template(tiled.processor).system == long


def test_every_text_between_pictures_has_its_bos(plain: Any) -> None:
    template = templates.XComposer2Template(plain.processor, system="")
    assert shown(template, [user("a", None, None, "b", None)]).count("<s>") == 3
    text = shown(template, [user("a", None, None, "b", None)])
    assert text.startswith("<s>[UNUSED_TOKEN_146]user\na<IMG><IMG><s>b<IMG><s>[UNUSED_TOKEN_145]\n")
    assert shown(template, [user("a")]).startswith("<s>[UNUSED_TOKEN_146]user\na")
    assert shown(template, [user(None, "", None)]).startswith("<s>[UNUSED_TOKEN_146]user\n<IMG><IMG><s>[UN")


def test_2_5_has_one_bos(tiled: Any) -> None:
    template = templates.XComposer25Template(tiled.processor, system="")
    for parts in (("a",), (None, "a", None), ("a", None)):
        assert shown(template, [user(*parts)]).count("<s>") == 1


def test_training_learns_answers_and_their_ends(plain: Any, tiled: Any) -> None:
    messages = [user(" one ", None), assistant(" two "), user("three"), assistant("four")]
    older = templates.XComposer2Template(plain.processor, system="Be brief.")
    newer = templates.XComposer25Template(tiled.processor, system="Be brief.")

    def learned(template: Any) -> str:
        return "".join(piece.text for piece in template.render(messages, train=True) if piece.train)

    for template, bos, eos in ((older, "<s>", ""), (newer, "", "</s>")):
        text = shown(template, messages, train=True)
        assert text.startswith("<s>[UNUSED_TOKEN_146]system\nBe brief.[UNUSED_TOKEN_145]\n")
        assert f"user\n one <IMG>{bos}[UNUSED_TOKEN_145]\n" in text
        assert text.endswith(f"[UNUSED_TOKEN_146]assistant\nfour[UNUSED_TOKEN_145]{eos}")
        inner = "[UNUSED_TOKEN_145]" if eos else ""
        assert learned(template) == f" two {inner}four[UNUSED_TOKEN_145]{eos}"
        assert shown(template, [assistant("plain text")], train=True) == "<s>plain text</s>"
    messages[-1]["loss"] = False
    assert (learned(older), learned(newer)) == (" two ", " two [UNUSED_TOKEN_145]")


def test_answers_end_with_a_turn_or_eos(plain: Any) -> None:
    template = templates.XComposer2Template(plain.processor)
    tokenizer = plain.processor.tokenizer
    assert template.stop_token_ids == (2, tokenizer.convert_tokens_to_ids("[UNUSED_TOKEN_145]"))
    assert (
        template.decode(tokenizer.encode(" It is red.[UNUSED_TOKEN_145]\nmore", add_special_tokens=False))
        == " It is red."
    )
    assert not template.penalize_prompt


def test_swift_queries_have_their_pictures_in_the_text(plain: Any) -> None:
    messages = conversation("<img>a.png</img>what <img>b.png</img>?", media_style="inline")
    template = templates.XComposer2Template(plain.processor, system="")
    assert "user\n<IMG><s>what <IMG><s>?[" in shown(template, messages)


def test_several_pictures_get_fewer_tiles_each(tiled: Any) -> None:
    large = str(tiled.root / "media" / "large.jpg")
    image = {"type": "image", "image": large}
    template = templates.XComposer25Template(tiled.processor)
    once = [{"role": "user", "content": [image]}]
    twice = [*once, assistant("a picture"), {"role": "user", "content": [image]}]

    def lengths(template: Any, messages: list) -> list[int]:
        return [item.length for item in template.encode(messages)["media"]]

    assert lengths(template, once) == [4081]
    assert lengths(template, twice) == [2061, 2061]
    assert lengths(template, once) == [4081]
    for fewer in (
        templates.XComposer25Template(XComposer2Processor.from_pretrained(tiled.checkpoint, hd_num=4)),
        templates.XComposer25Template(tiled.processor, hd_num=4),
    ):
        assert lengths(fewer, once) == lengths(fewer, twice)[:1] == [2061]
    assert tiled.processor.image_processor.hd_num == 24


def test_a_picture_is_prepared_once_in_a_chat(tiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    from mmtool.template import base

    monkeypatch.setattr(base, "load_image", lambda *args: opened.append(1) or load(*args))
    from mmtool.media import load_image as load

    messages = conversation(f"<img>{tiled.root / 'media' / 'tiny.png'}</img>?", media_style="inline")
    template = templates.XComposer25Template(tiled.processor)
    for _ in range(3):
        template.encode(messages)
    assert len(opened) == 1


def test_the_processor_of_another_variant_is_refused(plain: Any, hd: Any, tiled: Any) -> None:
    with pytest.raises(MMToolError, match="this is a internlm-xcomposer2-4khd-7b-chat model"):
        templates.XComposer25Template(hd.processor)
    with pytest.raises(MMToolError, match="internlm-xcomposer2_5-7b-chat"):
        templates.XComposer2Template(tiled.processor)
    with pytest.raises(MMToolError, match="explicit nor auto"):
        templates.XComposer25Template(tiled.processor, image_position="left")
    with pytest.raises(MMToolError, match="hd_num is 4, but this model has no tiles"):
        templates.XComposer2Template(plain.processor, hd_num=4)
    with pytest.raises(MMToolError, match="must be at least 1"):
        templates.XComposer25Template(tiled.processor, hd_num=0)
