"""Make the engine that a command asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtool.engine.base import Engine
from mmtool.errors import MMToolError
from mmtool.finetuned import FineTuned, attach_adapter
from mmtool.log import get_logger
from mmtool.utils import did_you_mean, import_object

if TYPE_CHECKING:
    from mmtool.groups.model import ModelArgs, VllmArgs
    from mmtool.spec import ModelSpec
    from mmtool.template.base import Template

logger = get_logger(__name__)

BACKENDS = ("AUTO", "pt")  # for a loaded model; vLLM loads the folder itself
OWN_ADAPTER = "--ckpt_dir"  # no adapter of --lora_modules can be called so


def create_engine(
    model: Any,
    processor: Any,
    backend: str = "AUTO",
    *,
    max_batch_size: int = 1,
    max_model_len: int | None = None,
    adapters: Mapping[str, Path] | None = None,
    **settings: Any,
) -> Engine:
    """Return an engine for a loaded model.

    Args:
        model: as ``load_model`` returns it.
        processor: its processor, or a tokenizer.
        backend: ``pt``, the engines on plain torch; ``AUTO`` is the same. A model that ``PtEngine`` cannot run as its
            own ``forward`` would (a sliding window, features in several layers) gets a ``GenericEngine``.
        max_batch_size: most requests at once.
        max_model_len: most positions of prompt and answer; the model's own limit by default.
        adapters: folders of LoRA adapters by the name that requests choose them by.
        settings: further ones of ``PtEngine``, such as ``preallocate``; a ``GenericEngine`` has no use for them.
    """
    if backend not in BACKENDS:
        raise MMToolError(f"unknown infer_backend {backend!r}", did_you_mean(backend, BACKENDS))
    fits_pt = import_object("mmtool.engine.fit:fits_pt")  # needs torch and transformers
    fits = fits_pt(model)
    import_object("mmtool.engine.memory:bound_programs")(max_batch_size)
    import_object("mmtool.engine.memory:keep_freed_memory")()
    path = "mmtool.engine.pt:PtEngine" if fits else "mmtool.engine.generic:GenericEngine"
    return import_object(path)(
        model,
        getattr(processor, "tokenizer", processor),
        max_batch_size=max_batch_size,
        max_model_len=max_model_len,
        adapters=adapters,
        **(settings if fits else {}),
    )


def open_engine(
    backend: str,
    given: ModelArgs,
    vllm: VllmArgs,
    spec: ModelSpec,
    folder: Path,
    template: Template,
    finetuned: FineTuned | None = None,
    *,
    merge_lora: bool = False,
    max_batch_size: int = 1,
    max_model_len: int | None = None,
    adapters: Mapping[str, Path] | None = None,
    **settings: Any,
) -> tuple[Engine, Any]:
    """Load a model for the engine of a command; return both the engine and the folder's generation config.

    Args:
        backend: ``--infer_backend``.
        given: how the model is loaded.
        vllm: how vLLM runs it, where that is the backend.
        spec: its type.
        folder: its folder.
        template: has the processor.
        finetuned: a checkpoint of ``mmtool sft``, whose adapter answers where requests name none.
        merge_lora: fold that adapter into the weights.
        max_batch_size: most requests at once.
        max_model_len: most positions of prompt and answer; the model's own limit by default.
        adapters: folders of LoRA adapters by the name that requests choose them by.
        settings: further ones of ``create_engine``.
    """
    own = finetuned.folder if finetuned is not None and finetuned.is_adapter else None
    if backend == "vllm":
        return _open_vllm(given, vllm, spec, folder, template, own, max_batch_size, max_model_len, adapters or {})
    network, processor = import_object("mmtool.loader:load_model")(
        spec,
        folder,
        dtype=given.dtype,
        device_map=given.device_map,
        attn_impl=given.attn_impl,
        model_kwargs=given.model_kwargs,
        processor=template.processor,
    )
    settings |= {"max_batch_size": max_batch_size, "max_model_len": max_model_len}
    if own is not None and not merge_lora and not adapters:
        try:
            engine: Any = create_engine(network, processor, backend, adapters={OWN_ADAPTER: own}, **settings)
        except import_object("mmtool.engine.adapters:KindError") as error:
            logger.debug("peft runs the adapter: %s", error.message)
        else:
            engine.answer_with(OWN_ADAPTER)
            return engine, network.generation_config
    if own is not None:
        network = attach_adapter(network, own, merge=merge_lora)
    return create_engine(network, processor, backend, adapters=adapters, **settings), network.generation_config


def _open_vllm(
    given: ModelArgs,
    vllm: VllmArgs,
    spec: ModelSpec,
    folder: Path,
    template: Template,
    own: Path | None,
    max_batch_size: int,
    max_model_len: int | None,
    adapters: Mapping[str, Path],
) -> tuple[Engine, Any]:
    if own is not None:
        adapters = {**adapters, OWN_ADAPTER: own}
    settings = import_object("mmtool.engine.vllm:VllmSettings")(
        dtype=import_object("mmtool.loader:number_format")(given.dtype, spec, folder),
        max_batch_size=max_batch_size,
        max_model_len=max_model_len,
        tensor_parallel_size=vllm.tensor_parallel_size,
        gpu_memory_utilization=vllm.gpu_memory_utilization,
        adapters=adapters,
        default_adapter=None if own is None else OWN_ADAPTER,
        more=vllm.vllm_args or {},
    )
    engine = import_object("mmtool.engine.vllm:VllmEngine")(spec, folder, template.tokenizer, settings)
    generation_config = import_object("transformers:GenerationConfig")
    if not (folder / "generation_config.json").is_file():
        return engine, generation_config()
    return engine, generation_config.from_pretrained(folder)
