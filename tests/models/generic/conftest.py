"""Tiny checkpoints of several architectures with random weights, saved by transformers itself, and what it answers."""

import io
import json
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Split

from mmtool.loader import get_template, load_model, open_folder
from mmtool.media import load_audio
from mmtool.messages import Audio, Message, Text
from mmtool.messages import Image as Image_

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou are a helpful "
    "assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}PLACE{% elif c['type'] == 'audio' %}"
    "<|audio_bos|><|AUDIO|><|audio_eos|>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "<start_of_turn>{{ role }}\n{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<start_of_image>{% else %}{{ c['text'] | trim }}"
    "{% endif %}{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
IDEFICS = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}{% if m['content'][0]['type'] == 'image' %}:"
    "{% else %}: {% endif %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% elif c['type'] == 'image' %}<image>{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|body|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|body|>\n\n{% endif %}"
)
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
CORPUS = "What is in the picture? a red circle and a blue square. user assistant system model You are helpful \n\n Hi"


def make_tokenizer(special: Sequence[str], **settings: Any) -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    # As in Llama 3 and Qwen: line ends are not taken together with what follows.
    words = Split(Regex(r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300 + len(special),
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS] * 3, trainer)
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def loud(model: Any) -> Any:
    """Weights much larger than fresh ones, so that every token depends clearly on all before it."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1.6 * weight[0].numel() ** -0.5)
    return model.eval()


def save(folder: Path, model: Any, processor: Any, chat_template: str | None) -> Path:
    loud(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return folder


def qwen_vl(folder: Path, name: str, **text: Any) -> Path:
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: positions along three axes, pictures of any size."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    tokenizer = make_tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    vocabulary = {token: tokenizer.convert_tokens_to_ids(token) for token in special}
    kinds = {"Qwen2VL": "qwen2_vl", "Qwen2_5_VL": "qwen2_5_vl", "Qwen3VL": "qwen3_vl"}
    vision = {
        "Qwen2VL": {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 64},
        "Qwen2_5_VL": {
            "hidden_size": 32, "depth": 2, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64,
            "fullatt_block_indexes": [1], "window_size": 56,
        },
        "Qwen3VL": {
            "hidden_size": 32, "depth": 3, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64,
            "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64, "patch_size": 14,
        },
    }[name]  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = {**TEXT, "vocab_size": len(tokenizer) + 6, "rope_parameters": rope, **text}
    if name == "Qwen3VL":
        text["head_dim"] = 16
    config = getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=vocabulary["<|image_pad|>"],
        video_token_id=vocabulary["<|video_pad|>"],
        vision_start_token_id=vocabulary["<|vision_start|>"],
        vision_end_token_id=vocabulary["<|vision_end|>"],
        eos_token_id=vocabulary["<|im_end|>"],
        tie_word_embeddings=False,
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    template = CHATML.replace("PLACE", "<|vision_start|><|image_pad|><|vision_end|>")
    loud(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template)
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": f"{name}Processor",
        "min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 20, "patch_size": 14, "merge_size": 2,
        "temporal_patch_size": 2,
    }  # fmt: skip
    assert kinds[name] == config.model_type
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def llava_onevision(folder: Path) -> Path:
    """A picture is cut in tiles when it is alone, and not when there are others."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    tokenizer = make_tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": len(tokenizer) + 6},
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_use_head": False,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        vision_feature_layer=-1,
    )  # fmt: skip
    loud(transformers.LlavaOnevisionForConditionalGeneration(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHATML.replace("PLACE", "<image>\n"))
    settings = {
        "image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": 28, "width": 28},
        "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    settings = {
        "processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 4, "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    }  # fmt: skip
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


def idefics3(folder: Path, name: str = "Idefics3") -> Path:
    """Pictures are cut in tiles, each between marks; SmolVLM is the same with other names."""
    special = ["<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>"]
    special += ["<global-img>", *(f"<row_{row}_col_{col}>" for row in range(1, 4) for col in range(1, 4))]
    tokenizer = make_tokenizer(special, eos_token="<end_of_utterance>", pad_token="<|endoftext|>")
    config = getattr(transformers, f"{name}Config")(
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(tokenizer) + 6, "pad_token_id": 0},
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 7,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    loud(getattr(transformers, f"{name}ForConditionalGeneration")(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(IDEFICS)
    settings = {
        "image_processor_type": f"{name}ImageProcessor", "processor_class": f"{name}Processor",
        "size": {"longest_edge": 84}, "max_image_size": {"longest_edge": 28}, "do_image_splitting": True,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    settings = {"processor_class": f"{name}Processor", "image_seq_len": 4}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


def gemma3(folder: Path) -> Path:
    """A sliding window of 16 in every other layer, and pictures whose positions see each other."""
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    special += ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    tokenizer = make_tokenizer(
        special,
        eos_token="<eos>",
        bos_token="<bos>",
        pad_token="<pad>",
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    )
    ids = tokenizer.convert_tokens_to_ids
    config = transformers.Gemma3Config(
        text_config={
            **TEXT, "num_hidden_layers": 4, "head_dim": 16, "vocab_size": len(tokenizer) + 6, "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 16,
        },
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "vision_use_head": False,
        },
        mm_tokens_per_image=4,
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
        image_token_index=ids("<image_soft_token>"),
        eos_token_id=[ids("<eos>"), ids("<end_of_turn>")],
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = [ids("<eos>"), ids("<end_of_turn>")]
    loud(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(GEMMA)
    settings = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 56, "width": 56}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    settings = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


def internvl(folder: Path) -> Path:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = make_tokenizer(
        special,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={**names, "video_token": "<video>"},
    )
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": len(tokenizer) + 6},
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": [28, 28], "patch_size": [7, 7],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        downsample_ratio=0.5,
    )  # fmt: skip
    loud(transformers.InternVLForConditionalGeneration(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHATML.replace("PLACE", "<IMG_CONTEXT>\n"))
    settings = {
        "image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 28, "width": 28}, "crop_to_patches": True,
        "min_patches": 1, "max_patches": 4,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    settings = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


def qwen2_audio(folder: Path) -> Path:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    tokenizer = make_tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = transformers.Qwen2AudioConfig(
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": len(tokenizer) + 6},
        audio_config={
            "model_type": "qwen2_audio_encoder", "num_mel_bins": 8, "d_model": 32, "encoder_layers": 2,
            "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "max_source_positions": 50,
        },
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )  # fmt: skip
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    processor = transformers.Qwen2AudioProcessor(extractor, tokenizer, chat_template=CHATML)
    return save(folder, transformers.Qwen2AudioForConditionalGeneration(config), processor, CHATML)


def llama(folder: Path, chat_template: str | None = LLAMA, **text: Any) -> Path:
    special = ["<|eos|>", "<|bos|>", "<|head|>", "<|body|>", "<|eot|>"]
    tokenizer = make_tokenizer(special, eos_token="<|eos|>", bos_token="<|bos|>", pad_token="<|eos|>")
    config = transformers.LlamaConfig(**{**TEXT, "vocab_size": len(tokenizer) + 6, "eos_token_id": 0, **text})
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [0, tokenizer.convert_tokens_to_ids("<|eot|>")]
    return save(folder, model, tokenizer, chat_template)


def text_model(folder: Path, name: str, **settings: Any) -> Path:
    """A plain language model with the chat template of the Qwen models."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = make_tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = {**TEXT, "vocab_size": len(tokenizer) + 6, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config | settings))
    return save(folder, model, tokenizer, CHATML)


MAKERS: dict[str, Callable[[Path], Path]] = {
    "qwen2_vl": lambda folder: qwen_vl(folder, "Qwen2VL"),
    "qwen2_5_vl": lambda folder: qwen_vl(folder, "Qwen2_5_VL"),
    "qwen3_vl": lambda folder: qwen_vl(folder, "Qwen3VL"),
    "llava_onevision": llava_onevision,
    "idefics3": idefics3,
    "smolvlm": lambda folder: idefics3(folder, "SmolVLM"),
    "gemma3": gemma3,
    "internvl": internvl,
    "qwen2_audio": qwen2_audio,
    "llama": llama,
    "qwen3": lambda folder: text_model(folder, "Qwen3", head_dim=16),
    "gemma2": lambda folder: text_model(folder, "Gemma2", head_dim=16, sliding_window=16, query_pre_attn_scalar=16),
    "cohere": lambda folder: text_model(folder, "Cohere", logit_scale=0.25),
    "mamba": lambda folder: text_model(folder, "Mamba", state_size=8),
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoint("llama")`` is a folder with that model, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = MAKERS[name](tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    def make(seed: int, width: int = 60, height: int = 44) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8)
        return Image.fromarray(pixels).resize((width, height))

    return make


@pytest.fixture(scope="session")
def sound() -> Callable[..., bytes]:
    """A WAV file of noise."""

    def make(seed: int) -> bytes:
        noise = np.random.default_rng(seed).normal(0, 0.2, 6000 + 2000 * seed).clip(-1, 1)
        file = io.BytesIO()
        with wave.open(file, "wb") as out:
            out.setparams((1, 2, 16_000, 0, "NONE", ""))
            out.writeframes((noise * 32767).astype(np.int16).tobytes())
        return file.getvalue()

    return make


class Opened:
    """A model with its processor and template, and what transformers makes of the same conversations."""

    def __init__(self, folder: Path, media: Callable[..., Image_ | Audio]) -> None:
        self.folder = folder
        self.spec, _ = open_folder(None, folder)
        self.model, self.processor = load_model(self.spec, folder, device_map="cpu")
        self.template = get_template(self.spec, self.processor)
        self.media = media

    def native(self, messages: Sequence[Message]) -> dict[str, Any]:
        """The processor's own inputs for the next answer."""
        kinds = {"image": lambda part: part.source, "audio": lambda part: load_audio(part.source)}
        dicts = []
        for message in messages:
            parts = []
            for part in message.parts:
                kind = "text" if isinstance(part, Text) else "image" if isinstance(part, Image_) else "audio"
                parts.append({"type": kind, kind: part.text if kind == "text" else kinds[kind](part)})
            dicts.append({"role": message.role, "content": parts if self.template.modalities else message.text})
        owner = self.processor if self.template.modalities else self.processor.tokenizer
        return owner.apply_chat_template(
            dicts, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )

    def generated(self, messages: Sequence[Message], length: int) -> tuple[int, ...]:
        """What ``generate`` answers greedily."""
        inputs = self.native(messages)
        out = self.model.generate(**inputs, do_sample=False, max_new_tokens=length, pad_token_id=0)
        return tuple(out[0, inputs["input_ids"].shape[1] :].tolist())


@pytest.fixture(scope="session")
def opened(checkpoint: Callable, picture: Callable, sound: Callable) -> Callable[[str], Opened]:
    """``opened("llama")``: the model, loaded once."""
    made: dict[str, Opened] = {}

    def open_(name: str) -> Opened:
        if name not in made:
            media = (lambda seed, **_: Audio(sound(seed))) if "audio" in name else None
            made[name] = Opened(checkpoint(name), media or (lambda *args, **size: Image_(picture(*args, **size))))
        return made[name]

    return open_


def user(*parts: str | Image_ | Audio) -> Message:
    return Message("user", tuple(Text(part) if isinstance(part, str) else part for part in parts))


def says(text: str, train: bool = True) -> Message:
    return Message("assistant", (Text(text),), train=train)


@pytest.fixture(scope="session")
def conversations() -> Callable[[Opened], dict[str, list[Message]]]:
    """Conversations of all kinds for a model, each the start of the next answer."""

    def make(opened: Opened) -> dict[str, list[Message]]:
        chats = {
            "text": [user("What is this? Hi")],
            "rounds": [user("Hi "), says("Hello you\nthere"), user(" and now?")],
            "system": [Message("system", (Text("Be brief."),)), user("Hi")],
        }
        if opened.template.modalities:
            one, two, other = opened.media(1), opened.media(2, width=32, height=80), opened.media(3)
            chats["one"] = [user(one, "What is in the picture?")]
            chats["two"] = [user(one, two, "compare")]
            chats["between"] = [user("look: ", one, " and ", other)]
            chats["again"] = [user(one, "what?"), says("a circle"), user("and this?")]
            chats["another"] = [user(one, "what?"), says("a circle"), user(other, "and this?")]
        return chats

    return make
