"""The tiny model in plain PyTorch: CLIP ViT, projector and Llama, with the weight names of the Yi-VL release."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizer import IMAGE, write_json
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
VIT_NAME = "tiny-vit"


@dataclass
class Dims:
    """The sizes of the model."""

    vocab_size: int = 1200
    image_size: int = 128
    patch_size: int = 16
    vit_hidden: int = 256
    vit_layers: int = 5
    vit_mlp: int = 704
    hidden: int = 256
    layers: int = 5
    mlp: int = 512
    head_dim: int = 64
    kv_heads: int = 2

    @property
    def image_tokens(self) -> int:
        """Return the number of positions that one picture takes."""
        return (self.image_size // self.patch_size) ** 2


def grid_positions(side: int, width: int) -> Tensor:
    """Return sines and cosines of the column and row of each patch, [side * side, width].

    The usual start for positions, noise a fiftieth as strong as the patches, takes most of a short training to grow;
    until then the ViT sees a bag of patches."""
    speed = 32.0 ** (-torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * speed
    wave = torch.cat([angle.sin(), angle.cos()], 1)
    return torch.cat([wave.repeat(side, 1), wave.repeat_interleave(side, 0)], 1)


class TinyVL(nn.Module):
    """Picture features replace the image placeholders in the language model's input."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.dims = dims
        # Eager attention: at these lengths it is several times faster on a CPU than the fused kernel's backward pass.
        self.vision = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=dims.vit_hidden,
                intermediate_size=dims.vit_mlp,
                num_hidden_layers=dims.vit_layers,
                num_attention_heads=dims.vit_hidden // dims.head_dim,
                image_size=dims.image_size,
                patch_size=dims.patch_size,
                hidden_act="gelu",
                layer_norm_eps=1e-5,
                attn_implementation="eager",
            )
        )
        with torch.no_grad():
            positions = self.vision.get_submodule("embeddings.position_embedding").weight
            positions[1:] = grid_positions(dims.image_size // dims.patch_size, dims.vit_hidden)
        self.projector = nn.Sequential(
            nn.Linear(dims.vit_hidden, dims.hidden),
            nn.LayerNorm(dims.hidden),
            nn.GELU(),
            nn.Linear(dims.hidden, dims.hidden),
            nn.LayerNorm(dims.hidden),
        )
        self.llm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=dims.vocab_size,
                hidden_size=dims.hidden,
                intermediate_size=dims.mlp,
                num_hidden_layers=dims.layers,
                num_attention_heads=dims.hidden // dims.head_dim,
                num_key_value_heads=dims.kv_heads,
                head_dim=dims.head_dim,
                max_position_embeddings=2048,
                rms_norm_eps=1e-5,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                tie_word_embeddings=False,
                attn_implementation="eager",
                bos_token_id=None,
                eos_token_id=2,
                pad_token_id=1,
            )
        )
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def look(self, pixels: Tensor) -> Tensor:
        """Return the ViT's patch features of uint8 pictures [n, height, width, 3]."""
        values = (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        # The last layer's output before post_layernorm, class token dropped (mm_vision_select_layer = -1).
        return self.vision(pixel_values=values).last_hidden_state[:, 1:]

    def embed(self, ids: Tensor, pixels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Embed token ids [rows, length], with the features of the pictures, in order, at the placeholders.
        Return the ViT's patch features as well."""
        embeds = self.llm.model.embed_tokens(ids)
        if pixels is None or not len(pixels):
            return embeds, None
        patches = self.look(pixels)
        features = self.projector(patches)
        where = (ids == IMAGE).flatten().nonzero().squeeze(1)
        flat = embeds.reshape(-1, embeds.shape[-1]).to(features.dtype)
        return flat.index_copy(0, where, features.reshape(len(where), -1)).view(*ids.shape, -1), patches

    def trunk(self, ids: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the final hidden states of whole rows and the ViT's patch features; padding stands at the right and
        is never attended to."""
        embeds, patches = self.embed(ids, pixels)
        return self.llm.model(inputs_embeds=embeds, use_cache=False).last_hidden_state, patches


def release_weights(model: TinyVL, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rename a state dict to the release's names; return the main file's and the ViT file's tensors in bfloat16."""
    main, vit = {}, {}
    for name, value in state.items():
        value = value.detach().to("cpu", torch.bfloat16).contiguous()
        if name.startswith("vision."):
            name = name.removeprefix("vision.").removeprefix("vision_model.")
            if "position_ids" not in name:
                vit["vision_model." + name] = value
        elif name.startswith("projector."):
            main["model.mm_" + name] = value
        else:
            main[name.removeprefix("llm.")] = value
    return main, vit


def save_release(model: TinyVL, state: dict[str, Tensor], folder: Path) -> None:
    """Write the checkpoint folder in the layout of the Yi-VL release."""
    dims = model.dims
    main, vit = release_weights(model, state)
    vit_folder = folder / "vit" / VIT_NAME
    vit_folder.mkdir(parents=True, exist_ok=True)
    save_file(main, folder / "model.safetensors", {"format": "pt"})
    save_file(vit, vit_folder / "model.safetensors", {"format": "pt"})
    for path in (folder / "model.safetensors", vit_folder / "model.safetensors"):
        path.chmod(0o644)  # safetensors makes files that only their owner may read
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlavaLlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": None,
            "eos_token_id": 2,
            "head_dim": dims.head_dim,
            "hidden_act": "silu",
            "hidden_size": dims.hidden,
            "image_aspect_ratio": "pad",
            "image_token_id": IMAGE,
            "initializer_range": 0.02,
            "intermediate_size": dims.mlp,
            "max_position_embeddings": 2048,
            "mm_hidden_size": dims.vit_hidden,
            "mm_projector_type": "mlp2x_gelu_Norm",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -1,
            "mm_vision_tower": f"./vit/{VIT_NAME}",
            "mmtool_model_type": "tiny",
            "model_type": "llava",
            "num_attention_heads": dims.hidden // dims.head_dim,
            "num_hidden_layers": dims.layers,
            "num_key_value_heads": dims.kv_heads,
            "pad_token_id": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_mm_proj": True,
            "vocab_size": dims.vocab_size,
        },
    )
    write_json(
        vit_folder / "config.json",
        {
            "architectures": ["CLIPVisionModel"],
            "attention_dropout": 0.0,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": dims.vit_hidden,
            "image_size": dims.image_size,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "intermediate_size": dims.vit_mlp,
            "layer_norm_eps": 1e-5,
            "model_type": "clip_vision_model",
            "num_attention_heads": dims.vit_hidden // dims.head_dim,
            "num_channels": 3,
            "num_hidden_layers": dims.vit_layers,
            "patch_size": dims.patch_size,
            "projection_dim": dims.vit_hidden,
            "torch_dtype": "bfloat16",
        },
    )
    write_json(
        vit_folder / "preprocessor_config.json",
        {
            "crop_size": dims.image_size,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": list(MEAN),
            "image_std": list(STD),
            "resample": 3,
            "size": dims.image_size,
        },
    )


def load_release(folder: Path) -> TinyVL:
    """Load a checkpoint folder; the bfloat16 weights are computed with in float32."""
    config = json.loads((folder / "config.json").read_text())
    vit_folder = folder / config["mm_vision_tower"]
    vit = json.loads((vit_folder / "config.json").read_text())
    model = TinyVL(
        Dims(
            vocab_size=config["vocab_size"],
            image_size=vit["image_size"],
            patch_size=vit["patch_size"],
            vit_hidden=vit["hidden_size"],
            vit_layers=vit["num_hidden_layers"],
            vit_mlp=vit["intermediate_size"],
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            mlp=config["intermediate_size"],
            head_dim=config["head_dim"],
            kv_heads=config["num_key_value_heads"],
        )
    )
    state = {}
    # Newer transformers leave the prefix "vision_model." out of the parameters' names.
    nested = any(name.startswith("vision.vision_model.") for name in model.state_dict())
    for name, value in load_file(vit_folder / "model.safetensors").items():
        state["vision." + (name if nested else name.removeprefix("vision_model."))] = value.float()
    for name, value in load_file(folder / "model.safetensors").items():
        inside = name.startswith("model.mm_projector.")
        state[name.removeprefix("model.mm_") if inside else "llm." + name] = value.float()
    missing = [name for name, _ in model.named_parameters() if name not in state]
    if missing:
        raise ValueError(f"{folder} lacks weights: {', '.join(missing[:5])}")
    model.load_state_dict(state, strict=False)  # buffers such as position_ids are not stored
    return model.eval()
