"""Make the engine that a command asks for."""

from __future__ import annotations

from typing import Any

from mmtool.engine.base import Engine
from mmtool.errors import MMToolError
from mmtool.utils import did_you_mean, import_object

BACKENDS = ("AUTO", "pt")


def create_engine(
    model: Any,
    processor: Any,
    backend: str = "AUTO",
    *,
    max_batch_size: int = 1,
    max_model_len: int | None = None,
) -> Engine:
    """Return an engine for a loaded model.

    Args:
        model: as ``load_model`` returns it.
        processor: its processor, or a tokenizer.
        backend: ``pt``, the engines on plain torch; ``AUTO`` is the same. A model that ``PtEngine`` cannot run as its
            own ``forward`` would (a sliding window, features in several layers) gets a ``GenericEngine``.
        max_batch_size: most requests at once.
        max_model_len: most positions of prompt and answer; the model's own limit by default.
    """
    if backend not in BACKENDS:
        raise MMToolError(f"unknown infer_backend {backend!r}", did_you_mean(backend, BACKENDS))
    fits_pt = import_object("mmtool.engine.fit:fits_pt")  # needs torch and transformers
    path = "mmtool.engine.pt:PtEngine" if fits_pt(model) else "mmtool.engine.generic:GenericEngine"
    return import_object(path)(
        model,
        getattr(processor, "tokenizer", processor),
        max_batch_size=max_batch_size,
        max_model_len=max_model_len,
    )
