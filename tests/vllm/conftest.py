"""Small random checkpoints in the layouts of the releases, each on the pt engine and on vLLM.

vLLM's attention on CPUs takes heads of 32 numbers and more, so the golden checkpoints, which have smaller ones, lend
their files and their shape alone. One vLLM engine lives at a time.
"""

import dataclasses
import gc
import importlib.util
import json
import math
import os
import shutil
import struct
import wave
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from mmtool.engine.base import Delta, Engine, Request, Sampling, request_from
from mmtool.engine.create import create_engine
from mmtool.loader import get_template, load_model, load_processor, open_folder
from mmtool.template.base import Template
from mmtool.utils import import_object

HEAD_SIZE = 32
# What is made small for each golden checkpoint beside its heads; the tiles of 560 pixels would take minutes.
TEMPLATE_OPTIONS = {"internlm-xcomposer2_5": {"hd_num": 2}, "internlm-xcomposer2/variant_4khd": {"hd_num": 2}}


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # vLLM's own are not ours to mend
            if missing:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed; see docs/vllm.md"))


@dataclasses.dataclass
class Pair:
    """One checkpoint on both engines."""

    name: str
    spec: Any
    folder: Path
    template: Template
    processor: Any
    pt: Engine
    media: Path
    vllm: Any = None

    def request(self, *turns: str | Sequence[Any], adapter: str | None = None, **sampling: Any) -> Request:
        """A request whose turns of the user are texts, or lists of media and a text; answers between them are ok."""
        messages: list[dict[str, Any]] = []
        for turn in turns:
            parts = [turn] if isinstance(turn, str) else list(turn)
            messages += [{"role": "assistant", "content": "ok"}] if messages else []
            messages.append({"role": "user", "content": [self._part(part) for part in parts]})
        settings = Sampling(**{"max_new_tokens": 10, "ignore_eos": True, **sampling})
        request = request_from(self.template, messages, settings)
        return dataclasses.replace(request, adapter=adapter)

    def _part(self, part: str) -> dict[str, str]:
        if part.endswith(".wav"):
            return {"type": "audio", "audio": str(self.media / part)}
        if part.endswith(".png"):
            return {"type": "image", "image": str(self.media / part)}
        return {"type": "text", "text": part}


def collect(engine: Engine, requests: Sequence[Request]) -> list[list[Delta]]:
    """Return the deltas of each request; none may fail."""
    found: list[list[Delta]] = [[] for _ in requests]
    for delta in engine.generate(requests):
        found[delta.index].append(delta)
    return found


def ids_of(deltas: Sequence[Delta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


@pytest.fixture(scope="session")
def answers() -> Callable[[Engine, Sequence[Request]], list[list[int]]]:
    """``answers(engine, requests)``: the token ids of all answers."""
    return lambda engine, requests: [ids_of(deltas) for deltas in collect(engine, requests)]


@pytest.fixture(scope="session")
def deltas() -> Callable[[Engine, Sequence[Request]], list[list[Delta]]]:
    return collect


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several shapes, and sounds of several lengths."""
    folder = tmp_path_factory.mktemp("media")
    sizes = {"square": (60, 60), "wide": (200, 70), "tall": (50, 160), "large": (640, 480)}
    for seed, (name, size) in enumerate(sizes.items()):
        noise = torch.randint(256, (6, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        picture = PIL.Image.fromarray(noise.numpy()).resize(size, PIL.Image.Resampling.BICUBIC)
        picture.save(folder / f"{name}.png")
    for name, seconds, pitch in (("short", 0.7, 440), ("long", 2.5, 300)):
        values = [int(8000 * math.sin(2 * math.pi * pitch * i / 16000)) for i in range(int(16000 * seconds))]
        with wave.open(str(folder / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(struct.pack(f"<{len(values)}h", *values))
    return folder


@pytest.fixture(scope="session")
def open_pair(
    golden: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, media: Path
) -> Callable[[str], Pair]:
    """``open_pair("yi-vl")``: a random checkpoint of that shape, or the embedded model, on the pt engine."""
    pairs: dict[str, Pair] = {}

    def find(name: str) -> Pair:
        if name not in pairs:
            folder = None
            if name != "tiny":
                folder = make_checkpoint(golden(name) / "checkpoint", tmp_path_factory.mktemp("model") / "folder")
            spec, folder = open_folder("tiny" if name == "tiny" else None, folder)
            processor = load_processor(spec, folder)
            template = get_template(spec, processor, TEMPLATE_OPTIONS.get(name))
            model, _ = load_model(spec, folder, dtype="fp32", device_map="cpu", processor=processor)
            pairs[name] = Pair(name, spec, folder, template, processor, create_engine(model, processor), media)
            pairs[name].pt.max_batch_size = 4
        return pairs[name]

    return find


@pytest.fixture(scope="session")
def start_vllm() -> Iterator[Callable[..., Any]]:
    """``start_vllm(pair, adapters=...)`` runs the pair's folder on vLLM; the engine before it ends."""
    from mmtool.engine.vllm import VllmEngine, VllmSettings

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    running: list[Any] = []

    def start(pair: Pair, **settings: Any) -> Any:
        while running:
            running.pop().close()
            gc.collect()
        more = {"enforce_eager": True, **settings.pop("more", {})}
        chosen = VllmSettings(dtype="float32", max_batch_size=4, more=more, **settings)
        running.append(VllmEngine(pair.spec, pair.folder, pair.template.tokenizer, chosen))
        return running[0]

    yield start
    while running:
        running.pop().close()


def make_checkpoint(source: Path, folder: Path) -> Path:
    """Write a folder as ``source``, but with larger heads and random weights."""
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    if settings.get("kv_lora_rank") is not None:
        settings["qk_nope_head_dim"] = HEAD_SIZE - settings["qk_rope_head_dim"]
        settings.pop("head_dim", None)
    else:
        count, heads = settings["num_attention_heads"], settings["hidden_size"] // HEAD_SIZE
        grouped = settings.get("num_key_value_heads", count) < count
        settings |= {"num_attention_heads": heads, "num_key_value_heads": max(1, heads // 2) if grouped else heads}
    settings["torch_dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    spec, _ = open_folder(None, folder)
    model_class = import_object(spec.model_class)
    config = model_class.config_class.from_pretrained(folder)  # some sizes only the weights tell
    for path in list(folder.rglob("*")):
        if path.suffix in (".safetensors", ".bin") or path.name.endswith(".index.json"):
            path.unlink()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        model = model_class._from_config(config).eval()
        for weight in model.parameters():
            if weight.ndim > 1:  # much larger than a fresh model's, so that every token depends on all before it
                weight.normal_(0, 1.6 * weight[0].numel() ** -0.5)
    model.save_pretrained(folder)
    return folder
