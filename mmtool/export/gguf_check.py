"""Load a .gguf file with llama.cpp and compare ids and greedy answers with those of the model."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mmtool.errors import MMToolError
from mmtool.export.source import Source
from mmtool.export.verify import attach_adapters, conversations
from mmtool.loader import get_template, load_model
from mmtool.log import get_logger

logger = get_logger(__name__)

# How much less likely than the likeliest token one may be that llama.cpp takes, in standard deviations of the logits.
BOUNDS = {"f32": 0.01, "f16": 0.05, "bf16": 0.25, "q8_0": 0.5}
ANSWER_TOKENS = 16
_TEXTS = ("Hello world, 12345 it's", "你好，世界！", "  two  spaces\n\nnew\tline", "def f(x):\n    return x", "é 😀")
BINDINGS = ("llama_cpp", "xllamacpp")
INSTALL = "pip install 'mmtool[gguf]'"
CONTEXT = 512
TIMEOUT = 600.0


class LlamaCpp(Protocol):
    """A model that llama.cpp has loaded."""

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a plain text: nothing is added, no control token is read."""

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """Return the likeliest ids after a prompt, one after the other."""


def binding() -> str | None:
    """Return the package that runs llama.cpp, None where there is none."""
    return next((name for name in BINDINGS if importlib.util.find_spec(name) is not None), None)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[LlamaCpp]:
    """Load a file.

    Raises:
        MMToolError: where no package is installed that can, or llama.cpp refuses the file.
    """
    name = binding()
    if name is None:
        raise MMToolError("the check of a .gguf file needs llama.cpp", f"{INSTALL}, or --verify false.")
    try:
        yield _Library(path) if name == "llama_cpp" else _Server(path)
    except (ValueError, RuntimeError, OSError) as error:
        raise MMToolError(f"llama.cpp cannot use {path.name}: {error}", "Nothing was kept.") from error


def check(path: Path, kind: str, source: Source, device_map: Any) -> str:
    """Compare a file with its source; return what came out, for people.

    Raises:
        MMToolError: where texts have other ids, or llama.cpp answers otherwise.
    """
    model, processor = load_model(
        source.spec, source.folder, dtype="fp32", device_map=device_map, model_kwargs=source.model_kwargs
    )
    if source.adapters:
        model = attach_adapters(model, source.adapters)
    template = get_template(source.spec, processor)
    prompts = [messages[:-1] for messages in conversations(source.spec, source.system)]
    same = total = 0
    with opened(path) as llama_cpp:
        for text in _TEXTS:
            if llama_cpp.tokenize(text) != template.text_ids(text):
                raise MMToolError(
                    f"llama.cpp gives {text!r} other ids than the tokenizer; nothing was kept",
                    "Its tokenizer cannot be written as .gguf; --verify false writes it all the same.",
                )
        for prompt in prompts:
            ids = template.encode(prompt)["input_ids"]
            found = llama_cpp.greedy(ids, ANSWER_TOKENS)
            logits = _logits(model, ids + found, len(found))
            gaps = logits.max(-1).values - logits.gather(1, torch.tensor(found).unsqueeze(1)).squeeze(1)
            if float(gaps.max()) > BOUNDS[kind] * float(logits.std()):
                raise MMToolError(
                    f"llama.cpp answers otherwise than the model: its token is {float(gaps.max()):.3g} below the "
                    "likeliest one; nothing was kept",
                    "--verify false writes the file all the same.",
                )
            same, total = same + int((gaps == 0).sum()), total + len(found)
    return f"ids of {len(_TEXTS)} texts the same, {same} of {total} greedy ids the same ({binding()})"


@torch.no_grad()
def _logits(model: Any, ids: Sequence[int], count: int) -> Tensor:
    """Return the logits that each of the last ``count`` ids was chosen by."""
    device = model.get_input_embeddings().weight.device
    return model(input_ids=torch.tensor([ids], device=device)).logits[0, -count - 1 : -1].float().cpu()


class _Library:
    """llama-cpp-python: the functions of llama.cpp as it brings them, since its own class leaves less to set."""

    def __init__(self, path: Path) -> None:
        import llama_cpp

        self._library: Any = llama_cpp
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.use_extra_bufts = False  # for kernels of some CPUs, which crash on narrow matrices of q8_0
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), settings)
        if not self._model:
            raise ValueError("it does not load")
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = CONTEXT
        context.type_k = context.type_v = llama_cpp.GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(self._model, context)

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        ids = (self._library.llama_token * (len(data) + 8))()
        found = self._library.llama_tokenize(self._vocabulary, data, len(data), ids, len(ids), False, False)
        return list(ids[: max(0, found)])

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        library, found = self._library, list[int]()
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        given = list(ids)
        while len(found) < count:
            tokens = (library.llama_token * len(given))(*given)  # has to live as long as the batch
            if library.llama_decode(self._context, library.llama_batch_get_one(tokens, len(given))) != 0:
                raise RuntimeError("it does not compute")
            size = library.llama_vocab_n_tokens(self._vocabulary)
            logits = library.llama_get_logits_ith(self._context, -1)
            found.append(int(np.ctypeslib.as_array(logits, (size,)).argmax()))
            if library.llama_vocab_is_eog(self._vocabulary, found[-1]):
                break
            given = found[-1:]
        return found


class _Server:
    """xllamacpp: llama.cpp's own server, on a free port of this machine only."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = CONTEXT, 1, 0
        params.warmup = False
        params.verbosity = -1
        wide = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_type_k = params.cache_type_v = wide
        self._server: Any = xllamacpp.Server(params)

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self._server.listening_address}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return json.loads(answer.read())

    def tokenize(self, text: str) -> list[int]:
        return self._ask("/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"]

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        body = {
            "prompt": list(ids),
            "n_predict": count,
            "temperature": 0.0,
            "top_k": 1,
            "ignore_eos": False,
            "return_tokens": True,
            "cache_prompt": False,
        }
        return self._ask("/completion", body)["tokens"]
