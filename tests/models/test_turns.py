"""A second turn: what the first has computed of pictures, sounds and text is not computed again, for every family."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mmtool.engine.base import Sampling, request_from
from mmtool.engine.create import create_engine
from mmtool.loader import get_template, load_model, open_folder
from mmtool.messages import Audio, Image, Message, Text

FAMILIES = {
    "fm9g/gqa": {},
    "fm9g/mha": {},
    "fm9g/mla": {},
    "fm9g4b-v": {},
    "internlm-xcomposer2": {},
    "internlm-xcomposer2/variant_4khd": {"hd_num": 1},
    "internlm-xcomposer2_5": {"hd_num": 1},
    "megrez-3b-instruct": {},
    "megrez-3b-omni": {},
    "yi-vl": {},
}
SAMPLING = Sampling(max_new_tokens=6, ignore_eos=True)


def media(modalities: tuple[str, ...], golden: Path) -> list[Image | Audio]:
    pixels = np.random.default_rng(3).integers(0, 255, (9, 11, 3), dtype=np.uint8)
    parts: list[Image | Audio] = []
    if "image" in modalities:
        parts.append(Image(PIL.Image.fromarray(pixels).resize((60, 40))))
    if "audio" in modalities:
        parts.append(Audio(str(golden / "media" / "short_50ms_16k.wav")))
    return parts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_computes_what_is_new(family: str, golden: Callable[[str], Path]) -> None:
    spec, folder = open_folder(None, golden(family) / "checkpoint")
    model, processor = load_model(spec, folder, dtype="fp32", device_map="cpu")
    template = get_template(spec, processor, FAMILIES[family])
    parts = media(spec.modalities, golden(family))
    engine = create_engine(model, processor)

    question = Message("user", (*parts, Text("What is it?")))
    first = engine.answer(request_from(template, [question], SAMPLING))
    assert first.usage.image_features_computed == len(parts)
    turns = [question, Message("assistant", (Text("A cat, 27."),)), Message("user", (Text("你好, and now?"),))]
    request = request_from(template, turns, SAMPLING)
    second = engine.answer(request)
    assert second.usage.image_features_computed == 0
    assert second.usage.cached_tokens >= first.usage.prompt_tokens - 1
    assert second.token_ids == create_engine(model, processor).answer(request).token_ids

    again = engine.answer(request_from(template, [Message("user", (Text("Other."), *parts))], SAMPLING))
    assert again.usage.image_features_computed == 0, "the same pictures and sounds in another conversation"
