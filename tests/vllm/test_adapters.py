"""LoRA adapters by name: each request has its own, and they run beside each other."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mmtool.engine.create import create_engine
from mmtool.engine.vllm import VllmEngine, VllmSettings
from mmtool.errors import MMToolError
from mmtool.loader import load_model


@pytest.fixture(scope="module")
def make_adapter(tmp_path_factory):
    def make(pair, seed, targets=None, **settings):
        model, _ = load_model(pair.spec, pair.folder, dtype="fp32", device_map="cpu", processor=pair.processor)
        config = LoraConfig(r=8, lora_alpha=32, target_modules=targets or pair.spec.lora_target_modules, **settings)
        adapted = get_peft_model(model, config)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            for name, weight in adapted.named_parameters():
                if "lora_" in name:
                    weight.normal_(0, 0.15)
        folder = tmp_path_factory.mktemp("adapter")
        adapted.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("name", ["tiny", "internlm-xcomposer2", "fm9g/mla"])
def test_adapters_answer_as_on_the_pt_engine(name, open_pair, start_vllm, make_adapter, answers):
    pair = open_pair(name)
    adapters = {"one": make_adapter(pair, 1), "two": make_adapter(pair, 2)}
    model, _ = load_model(pair.spec, pair.folder, dtype="fp32", device_map="cpu", processor=pair.processor)
    pt = create_engine(model, pair.processor, max_batch_size=4, adapters=adapters)
    turns = ["square.png", "What is it?"] if pair.template.modalities else "What is it?"
    requests = [pair.request(turns, adapter=adapter) for adapter in ("one", None, "two", "one")]
    expected = answers(pt, requests)
    engine = start_vllm(pair, adapters=adapters)
    assert engine.adapters == ("one", "two")
    assert answers(engine, requests) == expected
    assert len({tuple(ids) for ids in expected}) == 3
    engine._default_adapter = "two"
    assert answers(engine, [pair.request(turns)]) == [expected[2]]


def test_adapters_that_vllm_cannot_add_to_requests_are_named(open_pair, make_adapter):
    pair = open_pair("tiny")

    def start(folder):
        VllmEngine(pair.spec, pair.folder, pair.template.tokenizer, VllmSettings(adapters={"a": folder}))

    tower = make_adapter(pair, 1, targets=r".*vision_tower.*q_proj")
    with pytest.raises(MMToolError, match="more than the language model") as caught:
        start(tower)
    assert "mmtool export --merge_lora true" in caught.value.hint
    whole = make_adapter(pair, 1)
    config = json.loads((whole / "adapter_config.json").read_text("utf-8"))
    (whole / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["lm_head"]}), "utf-8")
    with pytest.raises(MMToolError, match="holds whole modules"):
        start(whole)
