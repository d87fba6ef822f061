"""Several LoRA adapters at once: each request gets what a model with its adapter folded in would answer."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mmtool.engine.base import Sampling, request_from
from mmtool.engine.create import open_engine
from mmtool.engine.generic import GenericEngine
from mmtool.engine.pt import PtEngine
from mmtool.errors import CheckpointError, MMToolError
from mmtool.finetuned import FineTuned, attach_adapter
from mmtool.groups.model import ModelArgs, VllmArgs
from mmtool.loader import get_template, load_model, open_folder

DECODER = r".*language_model.*\.(q_proj|v_proj|down_proj)"
EVERYWHERE = r".*(q_proj|k_proj|o_proj|out_proj|up_proj|fc1|linear_1|multi_modal_projector\.\w+\.\d)"
KINDS: dict[str, dict[str, Any]] = {
    "narrow": {"r": 2, "lora_alpha": 4, "target_modules": DECODER},
    "wide": {"r": 5, "lora_alpha": 5, "use_rslora": True, "target_modules": EVERYWHERE},
    "uneven": {
        "r": 3, "lora_alpha": 3, "target_modules": DECODER,
        "rank_pattern": {"down_proj": 7}, "alpha_pattern": {"v_proj": 11},
    },
}  # fmt: skip


def make_adapter(model: Any, folder: Path, seed: int, **settings: Any) -> Path:
    """Write an adapter that changes answers clearly."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**settings))
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if ".lora_B." in name:
                    weight.normal_(0, 0.3)
                elif ".modules_to_save." in name:
                    weight.add_(0.3 * torch.randn_like(weight))
    adapted.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def folders(small, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(small.model, root / name, seed, **settings)
        for seed, (name, settings) in enumerate(KINDS.items())
    }


@pytest.fixture(scope="module")
def merged(small, folders) -> dict[str | None, Any]:
    """The model with one adapter each in its weights."""
    models = {name: attach_adapter(small.network(), folder, merge=True) for name, folder in folders.items()}
    return {None: small.model, **models}


def with_adapters(requests, names):
    return [dataclasses.replace(request, adapter=name) for request, name in zip(requests, names, strict=True)]


@pytest.fixture
def asked(small):
    """Requests that begin alike, with a picture or without, for every adapter and for none."""
    names = [None, *KINDS]
    plain = [small.request(small.ids(1, 20), small.ids(seed, 3 * seed), max_new_tokens=5 + seed) for seed in range(4)]
    seeing = [small.request(small.ids(2, 9), small.picture(1), small.ids(seed, 4)) for seed in range(4)]
    return with_adapters([*plain, *seeing], names * 2)


@pytest.mark.parametrize("max_batch_size", [1, 3, 8])
def test_answers_are_those_of_the_merged_models(small, folders, merged, asked, max_batch_size):
    engine = small.engine(small.network(), max_batch_size=max_batch_size, adapters=folders)
    assert engine.adapters == tuple(folders)
    expected = [small.generated(request, merged[request.adapter]) for request in asked]
    assert len({ids[:3] for ids in expected[4:]}) == 4, "the adapters make a difference"
    assert small.answers(engine, asked) == expected
    assert small.answers(engine, asked[::-1]) == expected[::-1]


def test_prefixes_and_features_are_shared_within_an_adapter_only(small, folders):
    engine = small.engine(small.network(), max_batch_size=4, adapters=folders)
    same = small.request(small.ids(1, 10), small.picture(1), small.ids(2, 8), max_new_tokens=2)
    requests = with_adapters([same] * 4, [None, "narrow", "uneven", "wide"])
    for request in requests:
        engine.answer(request)
    assert engine.stats.cached_tokens == 0
    assert engine.stats.vision_runs == 2  # "wide" changes the tower, the others do not
    for request in requests:
        engine.answer(request)
    assert engine.stats.cached_tokens == 4 * (len(same.input_ids) - 1)
    assert engine.stats.vision_runs == 2


def test_fast_step_stays_for_those_without_an_adapter(small, folders):
    engine = small.engine(small.network(), adapters=folders)
    plain = small.request(small.ids(1, 10))
    assert engine.answer(plain).token_ids == small.generated(plain)
    assert engine._step is not None


def test_model_is_as_before_outside_of_the_engine(small, folders):
    model = small.network()
    engine = small.engine(model, adapters=folders)
    request = small.request(small.ids(1, 10), small.picture(1))
    engine.answer(dataclasses.replace(request, adapter="wide"))
    assert small.generated(request, model) == small.generated(request)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in small.model.named_parameters()]


def test_failing_step_of_several_adapters_is_tried_row_by_row(small, folders, merged, asked):
    model = small.network()
    fails = [True]

    def fail(module, args, output):
        if len(args[0]) > 2 and fails:
            fails.pop()
            raise RuntimeError("once")

    model.model.language_model.norm.register_forward_hook(fail)
    engine = small.engine(model, max_batch_size=8, adapters=folders)
    assert small.answers(engine, asked) == [small.generated(request, merged[request.adapter]) for request in asked]
    assert not fails


def test_modules_trained_as_a_whole(small, tmp_path, asked):
    settings = {"r": 2, "target_modules": DECODER}
    folders = {
        "projector": make_adapter(
            small.model, tmp_path / "a", 1, modules_to_save=["multi_modal_projector"], **settings
        ),
        "head": make_adapter(small.model, tmp_path / "b", 2, modules_to_save=["lm_head"], **settings),
        "words": make_adapter(small.model, tmp_path / "c", 3, modules_to_save=["embed_tokens"], **settings),
    }
    models = {name: attach_adapter(small.network(), folder, merge=True) for name, folder in folders.items()}
    requests = with_adapters(asked, [None, *folders] * 2)
    engine = small.engine(small.network(), max_batch_size=5, adapters=folders)
    expected = [small.generated(request, models.get(request.adapter)) for request in requests]
    assert small.answers(engine, requests) == expected
    assert len({ids[:3] for ids in expected[4:]}) > 1


def test_generic_engine_has_adapters_too(small, folders, merged):
    from transformers import LlamaForCausalLM

    torch.manual_seed(3)
    model = LlamaForCausalLM(small.model.config.text_config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 2 * weight[0].numel() ** -0.5)
    root = folders["narrow"].parent / "text"
    own = {
        name: make_adapter(model, root / name, seed, r=3, target_modules=["q_proj", "up_proj"])
        for seed, name in enumerate(("one", "other"))
    }
    requests = with_adapters([small.request(small.ids(1, 12))] * 4, [None, "one", "other", "one"])
    models = {name: attach_adapter(copy.deepcopy(model), folder, merge=True) for name, folder in own.items()}
    expected = [small.generated(request, models.get(request.adapter, model)) for request in requests]
    assert len(set(expected)) == 3
    engine = GenericEngine(copy.deepcopy(model), small.tokenizer, max_batch_size=2, adapters=own)
    assert small.answers(engine, requests) == expected
    assert engine.kv_bytes > 0
    with pytest.raises(MMToolError, match="adapter"):
        engine.answer(dataclasses.replace(requests[0], adapter="no"))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_adapters_that_cannot_stand_beside_others_are_refused(small, folders, tmp_path, changed, named):
    source = folders["narrow"]
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changed), encoding="utf-8")
    with pytest.raises(MMToolError, match=named) as caught:
        small.engine(small.network(), adapters={"fine": source, "odd": tmp_path})
    assert "odd" in caught.value.message and "merge" in caught.value.hint


def test_one_adapter_may_answer_where_no_name_is_given(small, folders, merged, asked):
    engine = small.engine(small.network(), max_batch_size=4, adapters=folders)
    engine.answer_with("wide")
    expected = [small.generated(request, merged[request.adapter or "wide"]) for request in asked]
    assert small.answers(engine, asked) == expected


@pytest.mark.parametrize(("settings", "named"), [({}, ("--ckpt_dir",)), ({"use_dora": True}, ())])
def test_adapter_of_a_checkpoint_runs_in_the_engine_or_else_in_peft(
    small, tmp_path, asked, monkeypatch, settings, named
):
    folder = make_adapter(small.model, tmp_path, 5, r=3, target_modules=["q_proj", "down_proj"], **settings)
    monkeypatch.setattr("mmtool.loader.load_model", lambda *args, **kwargs: (small.network(), small.tokenizer))
    finetuned = FineTuned(folder, tmp_path, {}, is_adapter=True)
    fixed = SimpleNamespace(processor=small.tokenizer)
    engine, _ = open_engine("pt", ModelArgs(), VllmArgs(), None, tmp_path, fixed, finetuned, max_batch_size=3)
    assert tuple(engine.adapters) == named
    requests = with_adapters(asked, [None] * len(asked))
    model = attach_adapter(small.network(), folder, merge=True)
    assert small.answers(engine, requests) == [small.generated(request, model) for request in requests]


def test_adapters_that_do_not_fit_are_refused(small, folders, tmp_path):
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        small.engine(small.network(), adapters={"none": tmp_path})
    broken = make_adapter(small.model, tmp_path / "broken", 1, **KINDS["narrow"])
    from safetensors.torch import load_file, save_file

    path = broken / "adapter_model.safetensors"
    weights = load_file(path)
    weights[next(iter(weights))].fill_(torch.nan)
    save_file(weights, path)
    with pytest.raises(CheckpointError, match="finite"):
        small.engine(small.network(), adapters={"nan": broken})


# -- the families ----------------------------------------------------------------------------------------------------

FAMILIES = [
    "yi-vl", "internlm-xcomposer2", "internlm-xcomposer2_5", "megrez-3b-omni", "fm9g4b-v", "fm9g/gqa", "fm9g/mla",
]  # fmt: skip


def linear_names(model: Any) -> list[str]:
    head = model.get_output_embeddings()
    return [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and part is not head]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, golden: Callable[[str], Path], tmp_path: Path) -> None:
    root, _, inner = family.partition("/")
    folder = golden(root) / inner
    spec, checkpoint = open_folder(None, folder / "checkpoint")

    def fresh() -> Any:
        return load_model(spec, checkpoint, dtype="fp32")[0]

    model, processor = load_model(spec, checkpoint, dtype="fp32")
    template = get_template(spec, processor)
    requests = []
    for path in sorted((folder / "cases").glob("*/case.json"))[:8]:
        case = json.loads(path.read_text(encoding="utf-8"))
        if "messages" not in case or any(not isinstance(message["content"], list) for message in case["messages"]):
            continue
        messages = [message for message in case["messages"] if message["role"] == "user"][:1]
        for part in (part for message in messages for part in message["content"]):
            if part["type"] != "text":
                part[part["type"]] = str(folder / part[part["type"]])
        requests.append(request_from(template, messages, Sampling(max_new_tokens=6, ignore_eos=True)))
    requests = [request for request in requests if request.media][:1] or requests[:1]
    question = [{"role": "user", "content": "Where is it?"}]
    requests.append(request_from(template, question, Sampling(max_new_tokens=9, ignore_eos=True)))
    names = linear_names(model)
    in_decoder = {id(part) for part in model.get_decoder().modules()}
    decoder = [name for name in names if id(model.get_submodule(name)) in in_decoder]
    folders = {
        "all": make_adapter(model, tmp_path / "all", 1, r=3, lora_alpha=6, target_modules=names),
        "decoder": make_adapter(model, tmp_path / "decoder", 2, r=2, lora_alpha=2, target_modules=decoder),
    }
    asked = [dataclasses.replace(request, adapter=name) for request in requests for name in (None, *folders)]
    engine = PtEngine(model, processor.tokenizer, max_batch_size=len(asked), adapters=folders)
    found: dict[int, tuple[int, ...]] = {}
    for delta in engine.generate(asked):
        found[delta.index] = found.get(delta.index, ()) + delta.token_ids
    for name in (None, *folders):
        alone = fresh() if name is None else attach_adapter(fresh(), folders[name], merge=True)
        reference = PtEngine(alone, processor.tokenizer)
        for index, request in enumerate(asked):
            if request.adapter == name:
                expected = reference.answer(dataclasses.replace(request, adapter=None)).token_ids
                assert found[index] == expected, (name, index)
