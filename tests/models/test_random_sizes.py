"""Checkpoints of random sizes: from folder to forward pass, answer, saved folder, and back, for every family.

The recorded cases show one size of each network. Here heads, widths, layers, vocabularies, sides of pictures and the
optional keys of ``config.json`` are drawn at random; what must hold is that nothing depends on those of the recorded
checkpoints, and that the many ways through the code agree with each other.
"""

import io
import json
import random
import shutil
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from mmtool.llm import chat
from mmtool.loader import get_template, load_model, open_folder
from mmtool.messages import Audio, Image, Message, Text
from mmtool.models.common.weights import read_weights
from mmtool.models.fm9g.configuration_fm9g import FM9GConfig
from mmtool.models.fm9g.modeling_fm9g import FM9GForCausalLM
from mmtool.models.fm9g4b_v.configuration_fm9g4b_v import FM9GVConfig
from mmtool.models.fm9g4b_v.modeling_fm9g4b_v import FM9GVForConditionalGeneration
from mmtool.models.internlm_xcomposer2.configuration_internlm_xcomposer2 import MATRICES, XComposer2Config
from mmtool.models.internlm_xcomposer2.modeling_internlm_xcomposer2 import XComposer2ForConditionalGeneration
from mmtool.models.megrez.configuration_megrez import MegrezInstructConfig, MegrezOmniConfig
from mmtool.models.megrez.modeling_megrez import MegrezInstructForCausalLM, MegrezOmniForConditionalGeneration
from mmtool.models.yi_vl.configuration_yi_vl import YiVLConfig
from mmtool.models.yi_vl.modeling_yi_vl import YiVLForConditionalGeneration
from mmtool.utils import import_object

SEEDS = range(3)
# Absolute, float32, logits of about 5. Measured over 30 seeds of each family: a batch against its rows below 1e-4,
# fused against eager attention 1.4e-4 (InternLM-XComposer2, where a state is small, so that its norm makes much of it).
TOLERANCE, FUSED = 1e-4, 5e-4
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "generation_config.json")


def llama_sizes(draw: random.Random, head_dims: tuple[int, ...] = (8, 12, 16, 32)) -> dict[str, int]:
    """Draw the sizes of a decoder."""
    head_dim, kv_heads, groups = draw.choice(head_dims), draw.choice((1, 2, 3)), draw.choice((1, 2, 4))
    return {
        "hidden_size": head_dim * kv_heads * groups,
        "num_attention_heads": kv_heads * groups,
        "num_key_value_heads": kv_heads,
        "intermediate_size": draw.choice((24, 56, 88)),
        "num_hidden_layers": draw.choice((1, 2, 3)),
    }


def vision_sizes(draw: random.Random, head_dim: int | None = None) -> dict[str, int]:
    """Draw the sizes of a vision tower, without those of its pictures."""
    heads = draw.choice((1, 2, 3))
    return {
        "hidden_size": heads * (head_dim or draw.choice((8, 12))),
        "num_attention_heads": heads,
        "intermediate_size": draw.choice((20, 36)),
        "num_hidden_layers": draw.choice((2, 3)),
    }


def latent_sizes(draw: random.Random) -> dict[str, Any]:
    """Draw the sizes of a decoder with latent attention."""
    heads = draw.choice((2, 3, 5))
    return {
        "hidden_size": heads * draw.choice((8, 10, 16)),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": draw.choice((24, 56)),
        "num_hidden_layers": draw.choice((1, 2, 3)),
        "kv_lora_rank": draw.choice((8, 20)),
        "q_lora_rank": draw.choice((None, 12, 24)),
        "qk_nope_head_dim": draw.choice((6, 16)),
        "qk_rope_head_dim": draw.choice((4, 8)),
    }


def rope_scaling(draw: random.Random, rotary_dim: int, kinds: tuple[str | None, ...]) -> dict[str, Any]:
    """Draw the settings of the rotation; a short context makes the prompts of these tests reach beyond it."""
    kind, most = draw.choice(kinds), draw.choice((48, 2048))
    if kind == "longrope":
        factors = [[1 + draw.random() for _ in range(rotary_dim // 2)] for _ in range(2)]
        scaling = {"long_factor": factors[0], "short_factor": factors[1]}
        scaling["original_max_position_embeddings"] = draw.choice((24, most))
        return {"rope_scaling": {"type": kind, **scaling}, "max_position_embeddings": most}
    scaling = None if kind is None else {"type": kind, "factor": draw.choice((1.0, 2.0))}
    return {"rope_scaling": scaling, "max_position_embeddings": most}


def without_some(draw: random.Random, settings: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Leave optional keys out, or write null, as files of other people do."""
    for key in keys:
        match draw.choice(("kept", "kept", "absent", "null")):
            case "absent":
                settings.pop(key, None)
            case "null":
                settings[key] = None
    return settings


def fm9g(draw: random.Random, vocab_size: int) -> Any:
    latent = draw.random() < 0.4
    sizes = latent_sizes(draw) if latent else llama_sizes(draw)
    rotary = sizes["qk_rope_head_dim"] if latent else sizes["hidden_size"] // sizes["num_attention_heads"]
    kind = draw.choice(("fm9g", "fm9g3", "fm9g7b"))
    scales = {"scale_emb": draw.choice((1, 12)), "scale_depth": 1.4, "dim_model_base": draw.choice((7, 24))}
    optional = {"tie_word_embeddings": draw.random() < 0.5, "attention_bias": draw.random() < 0.5, "rope_theta": 5e3}
    rope = rope_scaling(draw, rotary, (None, "linear", "dynamic", "longrope"))
    settings = {**sizes, **rope, **scales, **optional, "vocab_size": vocab_size, "eos_token_id": draw.choice((2, [2]))}
    names = (*scales, *optional, *(() if latent else ("num_key_value_heads",)))
    return FM9GForCausalLM(FM9GConfig.from_dict({**without_some(draw, settings, names), "model_type": kind}))


def fm9g4b_v(draw: random.Random, vocab_size: int) -> Any:
    sizes = latent_sizes(draw)
    slices = {"max_slice_nums": draw.choice((1, 4, 9)), "scale_resolution": draw.choice((56, 84)), "patch_size": 14}
    text = {**sizes, **rope_scaling(draw, sizes["qk_rope_head_dim"], (None, "longrope")), "vocab_size": vocab_size}
    text |= {"scale_emb": 3, "scale_depth": 1.4, "dim_model_base": 7, "tie_word_embeddings": draw.random() < 0.5}
    vision = vision_sizes(draw, 72) | {"image_size": 14 * draw.choice((5, 20, 70)), "patch_size": 14}
    whole = {
        "query_num": draw.choice((4, 9, 16)),
        "drop_vision_last_layer": draw.random() < 0.5,
        "slice_mode": draw.random() < 0.8,
        "use_image_id": draw.random() < 0.5,
        "vision_batch_size": draw.choice((1, 16)),
    }
    names = ("tie_word_embeddings", "use_image_id", "vision_batch_size", "drop_vision_last_layer", "slice_mode")
    flat = without_some(draw, {**text, **whole, "slice_config": slices, "vision_config": vision}, names)
    return FM9GVForConditionalGeneration(FM9GVConfig.from_dict({**flat, "model_type": "fm9gv"}))


def megrez_omni(draw: random.Random, vocab_size: int) -> Any:
    text = llama_sizes(draw, (64,)) | {"num_key_value_heads": 2, "num_attention_heads": 4, "hidden_size": 256}
    heads, width = draw.choice(((1, 16), (2, 32), (3, 24)))
    audio = {"n_mels": draw.choice((80, 128)), "n_ctx": 1500, "n_state": width, "n_head": heads, "n_layer": 1}
    flat = {
        **text,
        "vocab_size": vocab_size,
        "rope_theta": 1e4,
        "query_num": draw.choice((3, 16)),
        "drop_vision_last_layer": draw.random() < 0.5,
        "tie_word_embeddings": draw.random() < 0.5,
        "vision_config": vision_sizes(draw) | {"image_size": 14 * draw.choice((8, 70)), "patch_size": 14},
        draw.choice(("audio", "audio_config")): audio | {"avg_pool": True, "audio_start_id": 5},
    }
    flat = without_some(draw, flat, ("tie_word_embeddings", "rope_theta"))
    return MegrezOmniForConditionalGeneration(MegrezOmniConfig.from_dict({**flat, "model_type": "megrezo"}))


def megrez_instruct(draw: random.Random, vocab_size: int) -> Any:
    sizes = llama_sizes(draw) | {"vocab_size": vocab_size, "rope_theta": 5_000_000, "bos_token_id": None}
    tied = draw.random() < 0.5
    return MegrezInstructForCausalLM(
        MegrezInstructConfig(
            **sizes, eos_token_id=997, pad_token_id=994, max_sequence_length=99, tie_word_embeddings=tied
        )
    )


def xcomposer2(variant: str) -> Callable[[random.Random, int], Any]:
    def make(draw: random.Random, vocab_size: int) -> Any:
        kind = draw.choice((None, "dynamic"))
        text = llama_sizes(draw) | {"vocab_size": vocab_size, "attention_bias": draw.random() < 0.3}
        text |= rope_scaling(draw, 0, (kind,)) | {"rope_theta": 1e4}
        text["plora_ranks"] = {name: draw.choice((2, 3, 8)) for name in MATRICES}
        text["plora_scales"] = {"wqkv": 2.0} if variant == "4khd" else {}
        text["task_lora_ranks"] = draw.choice(({}, {"sft": 2, "dpo": 3, "web": 4})) if variant == "2.5" else {}
        side = {"4khd": 336}.get(variant) or 14 * draw.choice((2, 4, 6))
        vision = vision_sizes(draw, 64) | {"image_size": side, "patch_size": 14, "hidden_act": "quick_gelu"}
        config = XComposer2Config(text_config=text, vision_config=vision, variant=variant)
        return XComposer2ForConditionalGeneration(config)

    return make


def yi_vl(draw: random.Random, vocab_size: int) -> Any:
    text = llama_sizes(draw) | {"vocab_size": vocab_size, "rope_theta": 1e4, "pad_token_id": 0}
    vision = vision_sizes(draw) | {"image_size": 14 * draw.choice((1, 3, 4)), "patch_size": 14, "hidden_act": "gelu"}
    whole = {
        "mm_vision_select_layer": draw.choice((-2, -1, -3)),
        "mm_vision_select_feature": draw.choice(("patch", "cls_patch")),
        "image_aspect_ratio": draw.choice(("pad", "square")),
        "tie_word_embeddings": draw.random() < 0.5,
    }
    text["tie_word_embeddings"] = whole["tie_word_embeddings"]
    return YiVLForConditionalGeneration(YiVLConfig(text_config=text, vision_config=vision, **whole))


FAMILIES: dict[str, tuple[str, Callable[[random.Random, int], Any]]] = {
    "fm9g": ("fm9g/gqa", fm9g),
    "fm9g4b-v": ("fm9g4b-v", fm9g4b_v),
    "megrez-3b-omni": ("megrez-3b-omni", megrez_omni),
    "megrez-3b-instruct": ("megrez-3b-omni", megrez_instruct),
    "internlm-xcomposer2": ("internlm-xcomposer2/variant_4khd", xcomposer2("2.0")),
    "internlm-xcomposer2-4khd": ("internlm-xcomposer2/variant_4khd", xcomposer2("4khd")),
    "internlm-xcomposer2_5": ("internlm-xcomposer2/variant_4khd", xcomposer2("2.5")),
    "yi-vl": ("yi-vl", yi_vl),
}


@torch.no_grad()
def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Give every weight a part in the result: norms near 1, matrices that keep the size of their input."""
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("inv_freq", "position_ids")) or not weight.is_floating_point():
            continue
        noise = torch.randn(weight.shape, generator=generator)
        is_norm = weight.ndim == 1 and name.endswith("weight")
        weight.copy_(
            1 + 0.1 * noise if is_norm else noise * weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1 * noise
        )


def pictures(seed: int) -> list[PIL.Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 11, 3), dtype=np.uint8)
    sizes = ((40, 30), (17, 160), (70, 70))
    return [PIL.Image.fromarray(pixels).resize(size) for size in sizes]


def wav(seed: int, seconds: float) -> Audio:
    noise = np.random.default_rng(seed).normal(0, 3000, int(16_000 * seconds)).astype(np.int16)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 16_000, 0, "NONE", ""))
        out.writeframes(noise.tobytes())
    return Audio(file.getvalue())


def conversations(modalities: tuple[str, ...], seed: int) -> list[list[Message]]:
    """Return prompts with and without media, of one turn and of two."""
    one, thin, square = pictures(seed)
    rows = [[Message("user", (Text("Hi, 27?"),))]]
    rows.append([rows[0][0], Message("assistant", (Text("Yes."),)), Message("user", (Text("你好 again"),))])
    if "image" in modalities:
        rows.append([Message("user", (Image(one), Text("What is it?")))])
        first = Message("user", (Image(thin), Text("and")))
        rows.append([first, Message("assistant", (Text("ok"),)), Message("user", (Image(square), Text("now?")))])
    if "audio" in modalities:
        rows.append([Message("user", (wav(seed, 0.7), Image(one), Text("hear")))])
        rows.append([Message("user", (wav(seed + 1, 0.11), Text("short")))])
    return rows


class Made:
    """A folder with a random checkpoint."""

    def __init__(self, family: str, seed: int, golden: Callable[[str], Path], folder: Path) -> None:
        source, make = FAMILIES[family]
        draw = random.Random(f"{family} {seed}")
        checkpoint = golden(source) / "checkpoint"
        known = json.loads((checkpoint / "config.json").read_text("utf-8"))["vocab_size"]
        torch.manual_seed(seed)
        model = make(draw, known + draw.choice((0, 0, 7))).eval()
        randomise(model, torch.Generator().manual_seed(seed))
        self.written, self.folder = model, folder
        model.save_pretrained(folder, max_shard_size=draw.choice(("20KB", "5GB")))
        for pattern in TOKENIZER_FILES:
            for path in checkpoint.glob(pattern):
                if not (folder / path.name).exists():
                    shutil.copyfile(path, folder / path.name)
        self.settings(draw, model.config)

    def settings(self, draw: random.Random, config: Any) -> None:
        """Write the file about pictures and sounds, as far as it cannot be left out."""
        settings: dict[str, Any] = {}
        if config.model_type == "fm9gv" and draw.random() < 0.5:
            settings = {"image_feature_size": config.query_num, "max_slice_nums": config.max_slices}
            settings |= {"scale_resolution": config.scale_resolution, "use_image_id": config.use_image_id}
            settings |= {"slice_mode": config.slice_mode}
        if config.model_type == "megrezo":
            settings = {"image_feature_size": config.query_num, "feature_size": config.audio_config.n_mels}
            settings |= {"scale_resolution": 112}
        if getattr(config, "variant", "2.0") != "2.0":
            settings = {"hd_num": 2}
        if settings:
            (self.folder / "preprocessor_config.json").write_text(json.dumps(settings), "utf-8")

    def open(self, folder: Path | None = None, **settings: Any) -> tuple[Any, Any, Any]:
        """Return spec, model and template of the folder, found from it alone."""
        spec, folder = open_folder(None, folder or self.folder)
        model, processor = load_model(spec, folder, dtype="fp32", device_map="cpu", **settings)
        return spec, model, get_template(spec, processor)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_any_size(family: str, seed: int, golden: Callable[[str], Path], tmp_path: Path) -> None:
    made = Made(family, seed, golden, tmp_path / "made")
    spec, model, template = made.open(attn_impl="sdpa")
    state, again = made.written.state_dict(), model.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)

    rows = conversations(spec.modalities, seed)
    encoded = [template.encode(row) for row in rows]
    with torch.no_grad():
        alone = [model(**template.collate([row])).logits[0] for row in encoded]
        batch = template.collate(encoded)
        together = model(**batch).logits
        for row, wanted in zip(together, alone, strict=True):
            torch.testing.assert_close(row[-len(wanted) :], wanted, atol=TOLERANCE, rtol=0)
        _, eager, _ = made.open(attn_impl="eager")
        for row, wanted in zip(encoded, alone, strict=True):
            assert wanted.isfinite().all()
            torch.testing.assert_close(eager(**template.collate([row])).logits[0], wanted, atol=FUSED, rtol=0)

    for row, prompt in zip(rows, encoded, strict=True):
        inputs = template.collate([prompt])
        wanted = model.generate(
            **inputs, do_sample=False, max_new_tokens=4, eos_token_id=list(template.stop_token_ids), pad_token_id=0
        )[0, len(prompt["input_ids"]) :].tolist()
        if len(prompt["input_ids"]) + 4 > model.config.get_text_config().max_position_embeddings:
            continue  # the engine refuses it; above, the rotation beyond the context was compared
        found = chat(model, template, row, max_new_tokens=4, do_sample=False, repetition_penalty=1.0).token_ids
        assert list(found) == wanted[: len(found)]
        assert found

    model.save_pretrained(tmp_path / "again")
    template.processor.save_pretrained(tmp_path / "again")
    assert read_weights(tmp_path / "again").keys() == read_weights(made.folder).keys(), "in the released layout"
    spec_again, model_again, template_again = made.open(tmp_path / "again", attn_impl="sdpa")
    assert spec_again.model_type == spec.model_type
    with torch.no_grad():
        for row, wanted in zip(rows, alone, strict=True):
            prompt = template_again.encode(row)
            found = model_again(**template_again.collate([prompt])).logits[0]
            torch.testing.assert_close(found, wanted, atol=0, rtol=0)
    assert import_object(spec.model_class) is type(model_again)
