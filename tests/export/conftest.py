"""Runs of `mmtool sft` and `mmtool export` in this process, on golden checkpoints."""

import importlib.util
import json
import math
import random
import warnings
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from mmtool.args import ExportArgs, SftArgs
from mmtool.export.main import export_main
from mmtool.loader import load_model, open_folder
from mmtool.options import read_args
from mmtool.sft.main import sft_main


@pytest.fixture(scope="session")
def rows_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``rows_of("image")`` is a file of rows, some with a picture."""
    folder = tmp_path_factory.mktemp("rows")
    rng = random.Random(0)
    for number in range(3):
        picture = PIL.Image.new("RGB", (64, 48), "white")
        PIL.ImageDraw.Draw(picture).ellipse((number, 8, 40, 38), fill=rng.choice(["red", "blue"]))
        picture.save(folder / f"{number}.png")
    with wave.open(str(folder / "tone.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        tone = (int(8000 * math.sin(n / 20)).to_bytes(2, "little", signed=True) for n in range(8000))
        file.writeframes(b"".join(tone))

    def make(*modalities: str) -> Path:
        rows = [{"query": f"say {number}", "response": f"I say {number}."} for number in range(4)]
        if "image" in modalities:
            rows += [{"query": "What is it?", "response": "a thing", "images": [f"{n}.png"]} for n in range(3)]
        if "audio" in modalities:
            rows += [{"query": "What is heard?", "response": "a tone", "audios": ["tone.wav"]}]
        path = folder / f"rows-{'-'.join(modalities)}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return make


@pytest.fixture
def train(rows_of: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``train(model, "image", lora_rank=4)`` trains an adapter for two steps and returns its checkpoint."""

    def run(model: Path | None, *modalities: str, name: str = "run", **changed: object) -> Path:
        options = {
            "dataset": rows_of(*modalities),
            "dataset_test_ratio": 0.3,
            "dataloader_num_workers": 0,
            "max_steps": 2,
            "save_steps": 2,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "warmup_ratio": 0,
            "output_dir": tmp_path / name,
            "add_output_dir_suffix": "false",
            "tensorboard": "false",
            "save_only_model": "true",
            "lora_target_modules": "ALL",
        } | changed
        if model is not None:
            options["model_id_or_path"] = model
        words = [word for key, value in options.items() for word in (f"--{key}", *str(value).split(" "))]
        sft_main(read_args(SftArgs, words, "mmtool sft"))
        return tmp_path / name / "checkpoint-2"

    return run


@pytest.fixture
def export() -> Callable[..., None]:
    """``export("--ckpt_dir", folder, "--merge_lora", "true")`` is the command."""

    def run(*words: object) -> None:
        export_main(read_args(ExportArgs, list(map(str, words)), "mmtool export"))

    return run


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``released("llama")`` is a folder with a tiny model of transformers, as its tests make them."""
    path = Path(__file__).parents[1] / "models" / "generic" / "conftest.py"
    spec = importlib.util.spec_from_file_location("generic_models", path)
    assert spec is not None
    assert spec.loader is not None
    makers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(makers)
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            if name == "llama-tied":
                makers.llama(folder, tie_word_embeddings=True)
            elif name == "gpt2":  # stores its matrices the other way round
                sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 96}
                makers.text_model(folder, "Qwen3", head_dim=16)
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
                ids = {"bos_token_id": 1, "eos_token_id": 2}
                config = transformers.GPT2Config(vocab_size=len(tokenizer) + 6, **ids, **sizes)
                makers.loud(transformers.GPT2LMHeadModel(config)).save_pretrained(folder)
            else:
                makers.MAKERS[name](folder)
            made[name] = folder
        return made[name]

    return make


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """``adapter(base, r=4, target_modules=[..])`` saves an adapter with random weights, by peft itself."""

    def make(base: Path | None, *, name: str = "adapter", size: float = 0.05, **settings: Any) -> Path:
        model, _ = load_model(*open_folder(None if base is not None else "tiny", base), dtype="fp32")
        config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, **settings})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied heads, and of layers that store their weight the other way round
            adapted = get_peft_model(model, config)
            generator = torch.Generator().manual_seed(len(name))
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        parameter += size * torch.randn(parameter.shape, generator=generator)
            adapted.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make
