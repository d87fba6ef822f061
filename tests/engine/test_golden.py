"""All golden conversations of Yi-VL through the engine, several at once, against the original's greedy answers."""

import dataclasses
import json

import pytest

from mmtool.engine.base import Sampling, request_from
from mmtool.engine.pt import PtEngine
from mmtool.models.yi_vl.modeling_yi_vl import YiVLForConditionalGeneration
from mmtool.models.yi_vl.processing_yi_vl import YiVLProcessor
from mmtool.models.yi_vl.template import YiVLTemplate


@pytest.mark.parametrize("max_batch_size", [1, 5])
def test_answers_of_the_original(golden, max_batch_size):
    folder = golden("yi-vl")
    processor = YiVLProcessor.from_pretrained(folder / "checkpoint")
    template = YiVLTemplate(processor)
    requests, wanted = [], []
    for case_dir in sorted((folder / "cases").iterdir()):
        case, expected = (json.loads((case_dir / f"{kind}.json").read_text("utf-8")) for kind in ("case", "expected"))
        # What is typed into the prompt in the inject cases is the template's matter; training cases have no answer.
        if "generated_ids" not in expected or case_dir.name.startswith("inject"):
            continue
        for part in (part for message in case["messages"] for part in message["content"] if part["type"] == "image"):
            part["image"] = folder / part["image"]
        sampling = Sampling(max_new_tokens=expected.get("max_new_tokens", 16))
        request = request_from(template, case["messages"], sampling, id=case_dir.name)
        if "stop_reason" not in expected:
            request = dataclasses.replace(request, stop_words=())
        requests.append(request)
        wanted.append(expected)
    assert len(requests) >= 15

    model = YiVLForConditionalGeneration.from_pretrained(folder / "checkpoint")
    engine = PtEngine(model, processor.tokenizer, max_batch_size=max_batch_size)
    ids, texts, reasons = {}, {}, {}
    for delta in engine.generate(requests):
        ids.setdefault(delta.index, []).extend(delta.token_ids)
        texts[delta.index] = texts.get(delta.index, "") + delta.text
        reasons[delta.index] = delta.finish_reason
    for index, expected in enumerate(wanted):
        name = requests[index].id
        assert ids[index] == expected["generated_ids"], name
        if expected["text_comparable"]:
            assert texts[index] == expected["generated_text_recommended"], name
        if "stop_reason" in expected:
            assert reasons[index] == "stop", name
    assert engine.stats.cached_tokens > engine.stats.prefill_tokens  # most begin with the same system text
