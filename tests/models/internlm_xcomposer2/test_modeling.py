"""InternLM-XComposer2 against itself: cache, batch, long prompts, attention kernels, training, adapters, real sizes."""

from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mmtool.errors import CheckpointError
from mmtool.models.internlm_xcomposer2.configuration_internlm_xcomposer2 import XComposer2Config
from mmtool.models.internlm_xcomposer2.modeling_internlm2 import RotaryAngles
from mmtool.models.internlm_xcomposer2.modeling_internlm_xcomposer2 import (
    XComposer2ForConditionalGeneration,
    XComposer2Model,
)
from mmtool.models.internlm_xcomposer2.spec import SPECS

Model = XComposer2ForConditionalGeneration
# peft asks transformers by a name that is going away.
PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LOGITS = 1e-4  # absolute, float32; measured 1.9e-5


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = LOGITS) -> None:
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)


@pytest.fixture
def one_picture(plain: Any) -> dict[str, torch.Tensor]:
    return plain.ask("shapes.png", text="Look at this, please.")


@torch.no_grad()
def test_decoding_with_a_cache_equals_the_full_forward(plain: Any, one_picture: dict) -> None:
    model, ids = plain.model, one_picture["input_ids"]
    full = model(**one_picture).logits
    cut = ids.shape[1] - 5
    first = model(ids[:, :cut], one_picture["pixel_values"], use_cache=True)
    steps, cache = [first.logits], first.past_key_values
    for position in range(cut, ids.shape[1]):
        step = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        steps.append(step.logits)
    assert_close(torch.cat(steps, dim=1), full)


@torch.no_grad()
def test_rows_with_none_one_and_two_pictures_share_a_batch(plain: Any) -> None:
    questions = [(), ("shapes.png",), ("tiny.png", "wide.png")]
    encoded = [plain.encode({"messages": [message(*names)]}) for names in questions]
    together = plain.model(**plain.batch(*encoded)).logits
    for row, logits in zip(encoded, together, strict=True):
        alone = plain.model(**plain.batch(row)).logits[0]
        assert_close(logits[-len(alone) :], alone)


def message(*names: str) -> dict:
    content = [{"type": "image", "image": f"media/{name}"} for name in names]
    return {"role": "user", "content": [*content, {"type": "text", "text": "Say more about it."}]}


@torch.no_grad()
def test_positions_are_counted_from_the_mask_where_they_are_not_given(plain: Any) -> None:
    batch = plain.batch(*(plain.encode({"messages": [message(*names)]}) for names in [(), ("tiny.png",)]))
    given = plain.model(**batch).logits
    del batch["position_ids"]
    real = batch["attention_mask"].bool()
    assert torch.equal(plain.model(**batch).logits[real], given[real])


@torch.no_grad()
def test_a_long_row_turns_neither_its_neighbours_nor_those_that_follow(plain: Any) -> None:
    limit = plain.model.config.text_config.max_position_embeddings
    long = [1, *torch.randint(300, 1000, (limit + 40,), generator=torch.Generator().manual_seed(1)).tolist()]
    short = long[:9]
    rows = [{"input_ids": ids, "media": []} for ids in (long, short)]
    before = plain.model(**plain.batch(rows[1])).logits[0]
    together = plain.model(**plain.batch(*rows)).logits
    assert_close(together[1, -len(short) :], before)
    assert torch.equal(plain.model(**plain.batch(rows[1])).logits[0], before)
    assert_close(together[0], plain.model(**plain.batch(rows[0])).logits[0])


def test_the_base_of_the_angles_grows_with_the_length_alone(plain: Any) -> None:
    config = plain.model.config.text_config
    rotary, x = RotaryAngles(config), torch.zeros(1)
    limit, head = config.max_position_embeddings, config.head_dim
    for length, factor in ((10, 1.0), (limit, 1.0), (limit + 1, (limit + 1) / limit), (2 * limit, 2.0)):
        _, sin = rotary(x, torch.arange(length).unsqueeze(0))
        base = 1e6 * factor ** (head / (head - 2))
        wanted = torch.tensor(length - 1.0) / base ** (torch.arange(0, head, 2) / head)
        assert_close(sin[0, -1, : head // 2], wanted.sin(), 1e-4)  # at angles up to 2047, in float32


@torch.no_grad()
def test_eager_attention_equals_sdpa(plain: Any, tiled: Any) -> None:
    for golden in (plain, tiled):
        inputs = golden.ask("tiny.png")
        eager = golden.load(attn_implementation="eager")
        parts = (eager.config, eager.model.vision_tower.config, eager.model.language_model.config)
        assert [config._attn_implementation for config in parts] == ["eager"] * 3
        assert_close(eager(**inputs).logits, golden.model(**inputs).logits)


@torch.no_grad()
def test_the_low_rank_paths_act_at_image_positions_alone(plain: Any, one_picture: dict) -> None:
    layer = plain.model.model.language_model.layers[0].attention
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, False, False], [False, True, True]])
    base = layer.wqkv(x)
    found = layer.wqkv_branch(x, base, mask)
    path = layer.wqkv_branch.Plora_B(layer.wqkv_branch.Plora_A(x))
    assert torch.equal(found[~mask], base[~mask])
    assert_close(found[mask], (base + path)[mask], 1e-6)
    assert torch.equal(layer.wqkv_branch(x, base, None), base)
    # The mask that `forward` makes of the ids is the one the engine passes with embeddings.
    embeds = plain.model.get_input_embeddings()(one_picture["input_ids"])
    places = one_picture["input_ids"] == 258
    embeds[places] = plain.model.get_image_features(one_picture["pixel_values"]).pooler_output[0]
    wanted = plain.model(**one_picture).logits
    assert_close(plain.model(inputs_embeds=embeds, im_mask=places).logits, wanted, 1e-6)
    assert not torch.allclose(plain.model(inputs_embeds=embeds).logits, wanted, atol=1e-2)


def test_wqkv_of_4khd_counts_twice(hd: Any, plain: Any) -> None:
    layer = hd.model.model.language_model.layers[1]
    assert (layer.attention.wqkv_branch.scale, layer.attention.wo_branch.scale) == (2.0, 1.0)
    assert (layer.attention.wqkv_branch.Plora_A.out_features, layer.feed_forward.w1_branch.Plora_A.out_features) == (
        8,
        16,
    )
    assert plain.model.model.language_model.layers[1].attention.wqkv_branch.scale == 1.0


@torch.no_grad()
def test_pictures_of_one_call_do_not_change_each_other(tiled: Any) -> None:
    apart = [tiled.processor.image_processor(images=[tiled_picture(tiled, name)]) for name in ("tiny.png", "tall.jpg")]
    fields = {key: [torch.as_tensor(item[key]) for item in apart] for key in ("pixel_values", "view_layout")}
    together = tiled.model.get_image_features(**{key: torch.cat(rows) for key, rows in fields.items()}).pooler_output
    assert [len(rows) for rows in together] == [841, 1261]
    listed = tiled.model.get_image_features(fields["pixel_values"], fields["view_layout"]).pooler_output
    for index, rows in enumerate(together):
        alone = tiled.model.get_image_features(*(fields[key][index] for key in fields)).pooler_output[0]
        assert_close(rows, alone, 1e-5)
        assert torch.equal(rows, listed[index])
    with pytest.raises(ValueError, match="view_layout"):
        tiled.model.get_image_features(fields["pixel_values"][0])
    with pytest.raises(ValueError, match="came with"):
        tiled.model.get_image_features(fields["pixel_values"][0], fields["view_layout"][1][:2])


def tiled_picture(golden: Any, name: str) -> Any:
    from PIL import Image

    return Image.open(golden.root / "media" / name)


def test_a_wrong_number_of_image_positions_names_both_counts(plain: Any, one_picture: dict) -> None:
    with pytest.raises(ValueError, match=r"256 media positions.* 512 features"):
        plain.model(one_picture["input_ids"], one_picture["pixel_values"].repeat(2, 1, 1, 1))


def test_training_with_gradient_checkpoints_gives_the_same_gradients(plain: Any, one_picture: dict) -> None:
    model = plain.load().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**one_picture, labels=one_picture["input_ids"], use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    usual = gradients()
    assert usual.keys() == {name for name, _ in model.named_parameters()}
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its newer name first
    for name, gradient in gradients().items():
        assert_close(gradient, usual[name], 1e-6)
    assert usual["model.language_model.layers.0.attention.wqkv_branch.Plora_A.weight"].abs().sum() > 0
    assert usual["model.language_model.tok_embeddings.weight"][2].abs().sum() == 0, "the padding row"


def test_in_training_all_parameters_take_part_even_without_pictures(plain: Any) -> None:
    model = plain.load().train()
    ids = torch.tensor([[1, 300, 301, 302]])
    model.model.language_model.requires_grad_(True)
    model(ids, labels=ids).loss.backward()
    paths = {name: p for name, p in model.named_parameters() if "Plora" in name}
    assert paths
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in paths.values())


def test_task_weights_are_trained_only_where_they_are_used(tiled: Any) -> None:
    def trained(model: Any) -> set[str]:
        names = [name.split(".")[-2] for name, p in model.named_parameters() if ".lora_" in name and p.requires_grad]
        return {name[:8] for name in names}

    assert trained(tiled.load()) == set()
    assert trained(tiled.load(task_mode="web")) == {"lora_web"}


def test_a_task_mode_without_its_weights_is_refused(plain: Any, tiled: Any) -> None:
    with pytest.raises(CheckpointError, match="no lora_sft weights"):
        plain.load(task_mode="write")
    with pytest.raises(CheckpointError, match="not one of base, write, web"):
        tiled.load(task_mode="poems")


@torch.no_grad()
def test_task_weights_can_be_left_out(tiled: Any) -> None:
    small, inputs = tiled.load(task_loras=False), tiled.ask(text="Hello")
    assert not any(".lora_" in name for name in small.state_dict())
    assert torch.equal(small(**inputs).logits, tiled.model(**inputs).logits)


@PEFT
def test_the_default_targets_are_the_five_matrices(tiled: Any) -> None:
    spec = SPECS[-1]
    model = get_peft_model(tiled.load(), LoraConfig(r=2, target_modules=spec.lora_target_modules))
    adapted = {
        name.removesuffix(".lora_A.default") for name, _ in model.named_modules() if name.endswith("lora_A.default")
    }
    assert len(adapted) == 5 * 2
    assert {name.rsplit(".", 1)[1] for name in adapted} == {"wqkv", "wo", "w1", "w2", "w3"}
    for part, prefixes in spec.parts.items():
        assert all(any(name.startswith(prefix) for name, _ in tiled.model.named_parameters()) for prefix in prefixes), (
            part
        )


@PEFT
def test_an_adapter_on_the_low_rank_paths_merges_into_them(plain: Any, one_picture: dict) -> None:
    torch.manual_seed(3)
    adapted = get_peft_model(
        plain.load(), LoraConfig(r=2, target_modules=r".*wqkv_branch\.Plora_[AB]", init_lora_weights=False)
    )
    with torch.no_grad():
        wanted = adapted(**one_picture).logits
        merged = adapted.merge_and_unload()
        assert_close(merged(**one_picture).logits, wanted)
    base, weights = plain.model.state_dict(), merged.state_dict()
    assert all(("Plora" in name and "wqkv" in name) or torch.equal(weights[name], base[name]) for name in base)


@torch.no_grad()
def test_bfloat16_is_near(plain: Any, one_picture: dict) -> None:
    half = plain.load(dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    logits = half(**one_picture).logits
    assert logits.dtype == torch.bfloat16
    assert_close(logits.float(), plain.model(**one_picture).logits, 0.6)  # logits reach 7


def test_what_serving_engines_look_for(plain: Any) -> None:
    model = plain.model
    assert Model._supports_attention_backend
    assert XComposer2Model._supports_attention_backend
    assert model.base_model_prefix == "model"
    assert model.media_mask_argument == "im_mask"
    assert model.get_input_embeddings() is model.model.language_model.tok_embeddings
    assert model.get_decoder() is model.model.language_model
    names = {name for name, _ in model.model.named_children()}
    assert names == {"language_model", "vision_tower", "multi_modal_projector"}
    assert model.config.get_text_config() is model.config.text_config
    assert model.config.image_token_id == 258 < model.config.text_config.vocab_size
    assert model.config.architectures
    assert str(model.config.dtype).removeprefix("torch.") == "float32"  # saving, in another test, makes it a string
    assert model.generation_config.max_length is None, "1600 in the file would end a long prompt at once"


# config.json of the releases, as docs/models says; 2.5 as far as it is known.
RELEASE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 92544, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
    "rope_theta": 1000000, "rope_scaling": {"type": "dynamic", "factor": 1.0}, "bias": False, "pad_token_id": 2,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
RELEASES = {
    "7b": {"architectures": ["InternLMXComposer2ForCausalLM"], "model_type": "internlmxcomposer2", "img_size": 224},
    "vl": {"architectures": ["InternLMXComposer2ForCausalLM"], "model_type": "internlmxcomposer2", "img_size": 490},
    "4khd": {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "max_length": 16384},
    "2.5": {"architectures": ["InternLMXComposer2ForCausalLM"], "model_type": "internlm2", "max_length": 16384},
}
POSITIONS = {"7b": 257, "vl": 1226, "4khd": 577, "2.5": 1601}
# In billions: language model, its paths for pictures, those for tasks, vision tower, projector.
COUNTS = {
    "7b": (7.74, 0.60, 0.0, 0.30, 0.02),
    "vl": (7.74, 0.60, 0.0, 0.30, 0.02),
    "4khd": (7.74, 0.52, 0.0, 0.30, 0.03),
    "2.5": (7.74, 0.60, 2.42, 0.30, 0.03),
}


@pytest.mark.parametrize("name", RELEASES)
def test_the_released_sizes_have_the_released_weights(name: str, tmp_path: Any) -> None:
    config = XComposer2Config.from_dict(XComposer2Config.nested(RELEASE | RELEASES[name], tmp_path))
    with torch.device("meta"):
        model = Model(config)
    shapes = {ours: tuple(weight.shape) for ours, weight in model.state_dict().items()}
    rank = 8 if name == "4khd" else 256
    released = {
        "model.tok_embeddings.weight": (92544, 4096),
        "model.layers.0.attention_norm.weight": (4096,),
        "model.layers.31.ffn_norm.weight": (4096,),
        "model.layers.0.attention.wqkv.weight": (6144, 4096),
        "model.layers.0.attention.wqkv.Plora_A.weight": (rank, 4096),
        "model.layers.0.attention.wqkv.Plora_B.weight": (6144, rank),
        "model.layers.0.attention.wo.weight": (4096, 4096),
        "model.layers.0.attention.wo.Plora_A.weight": (256, 4096),
        "model.layers.0.feed_forward.w1.weight": (14336, 4096),
        "model.layers.0.feed_forward.w1.Plora_B.weight": (14336, 256),
        "model.layers.0.feed_forward.w3.weight": (14336, 4096),
        "model.layers.0.feed_forward.w2.weight": (4096, 14336),
        "model.layers.0.feed_forward.w2.Plora_A.weight": (256, 14336),
        "model.norm.weight": (4096,),
        "output.weight": (92544, 4096),
        "vision_proj.0.weight": (4096, 1024 if name in ("7b", "vl") else 4096),
        "vision_proj.0.bias": (4096,),
        "vision_proj.2.weight": (4096, 4096),
        "vision_proj.2.bias": (4096,),
        "vit.vision_tower.vision_model.embeddings.class_embedding": (1024,),
        "vit.vision_tower.vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        "vit.vision_tower.vision_model.embeddings.position_embedding.weight": (POSITIONS[name], 1024),
        "vit.vision_tower.vision_model.pre_layrnorm.weight": (1024,),
        "vit.vision_tower.vision_model.encoder.layers.23.mlp.fc1.weight": (4096, 1024),
        "vit.vision_tower.vision_model.encoder.layers.0.self_attn.out_proj.bias": (1024,),
    }
    if name in ("4khd", "2.5"):
        released |= {"plora_glb_GN": (1, 1, 4096), "plora_sub_GN": (1, 1, 1, 4096)}
    if name == "2.5":
        released |= {
            "model.layers.7.attention.wo.lora_sft_A.weight": (256, 4096),
            "model.layers.7.attention.wqkv.lora_dpo_B.weight": (6144, 256),
            "model.layers.7.feed_forward.w2.lora_web_A.weight": (512, 14336),
        }
    assert {key: shapes[Model.our_name(key)] for key in released} == released
    per_layer = 7 + 10 + (30 if name == "2.5" else 0)
    extra = 2 if name in ("4khd", "2.5") else 0
    assert len(shapes) == 3 + 32 * per_layer + 4 + extra + 5 + 24 * 16
    assert not any("post_layernorm" in key for key in shapes)

    counts = Counter()
    for key, shape in shapes.items():
        kind = next(kind for kind, mark in KINDS.items() if mark in key)
        counts[kind] += torch.Size(shape).numel() / 1e9
    found = tuple(counts[kind] for kind in ("llm", "plora", "tasks", "vision", "projector"))
    assert found == pytest.approx(COUNTS[name], abs=0.01)
    assert model.config.text_config.head_dim == 128
    vision = model.config.vision_config
    assert (vision.image_size // vision.patch_size) ** 2 + 1 == POSITIONS[name]
    assert model.config.text_config.max_sequence_length == (4096 if name in ("7b", "vl") else 16384)


KINDS = {"vision": "vision_tower", "projector": "projector", "plora": "Plora", "tasks": ".lora_", "llm": ""}
