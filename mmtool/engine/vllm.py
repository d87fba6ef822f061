"""The engine on vLLM: prompts, media and text stay mmtool's, vLLM computes and schedules.

Prompts go over as token ids, media as the tensors that the template made of them, so vLLM sees what the pt engine sees.
Its engine runs in this process: ``step`` of ours is ``step`` of it. Stop texts and decoding are ours as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from mmtool.engine.base import Request, TokenLogprob
from mmtool.engine.stepped import Run, SteppedEngine
from mmtool.errors import MMToolError, TooLongError
from mmtool.log import get_logger
from mmtool.models.common.folders import read_json
from mmtool.models.common.quantised import CONFIG_KEY
from mmtool.utils import import_object
from mmtool.vllm_plugin import architectures

if TYPE_CHECKING:
    from mmtool.spec import ModelSpec
    from mmtool.template.base import MediaInput

logger = get_logger(__name__)

MOST_SEEN = 10_000  # media that are remembered to have been there before

# Names that VllmEngine gives itself.
_OWN_ARGS = ("model", "tokenizer", "hf_overrides", "logits_processors", "skip_tokenizer_init")


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """How vLLM runs a model.

    Attributes:
        dtype: of the weights: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        max_batch_size: most requests at once.
        max_model_len: most positions of prompt and answer; None for the model's own limit.
        tensor_parallel_size: GPUs that share the model.
        gpu_memory_utilization: share of a GPU's memory that vLLM takes; None for vLLM's default.
        adapters: folders of LoRA adapters, by the name that requests choose.
        default_adapter: the adapter of requests that choose none.
        more: further fields of vLLM's ``EngineArgs``.
    """

    dtype: str = "auto"
    max_batch_size: int = 1
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    default_adapter: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


class VllmEngine(SteppedEngine):
    """Runs a model folder on vLLM, in the layout of a release or in ours.

    Args:
        spec: its model type.
        folder: its folder.
        tokenizer: makes text of answers.
        settings: how it runs.

    Raises:
        MMToolError: when vLLM is not installed, an option is unknown to it, or it cannot run the model.
    """

    def __init__(self, spec: ModelSpec, folder: Path, tokenizer: Any, settings: VllmSettings) -> None:
        import_vllm()
        self._default_adapter = settings.default_adapter
        self._loras = _lora_requests(spec, settings.adapters)
        self.llm = _start(spec, folder, settings)
        config = self.llm.vllm_config
        model = config.model_config
        super().__init__(None, tokenizer, config.scheduler_config.max_num_seqs, model.max_model_len)
        self.adapters = tuple(settings.adapters)
        self.vocab_size = model.get_vocab_size()
        self.kv_bytes = _kv_bytes(self.llm)
        logger.info("KV memory: %.1f MB, for all conversations together", self.kv_bytes / 1e6)
        self._encoder_room: int = getattr(self.llm.input_processor, "mm_encoder_cache_size", 0)
        self._started: dict[str, Run] = {}
        self._seen: dict[str, None] = {}  # keys of media, those of long ago left out
        self._count = 0

    # What callers use

    def check(self, request: Request) -> None:
        """Raise MMToolError for a request that can never run; see ``Engine.check``."""
        super().check(request)
        try:
            _sampling_params(request, 1, self.vocab_size)
        except ValueError as error:
            raise MMToolError(f"vLLM: {error}") from None
        most = max((item.num_features for item in request.media), default=0)
        if most > (self._encoder_room or most):
            raise TooLongError(
                f"a picture or sound takes {most} positions; vLLM keeps room for {self._encoder_room}",
                "Raise the room: --vllm_args '{\"max_num_batched_tokens\": N}'.",
                length=most,
                limit=self._encoder_room,
            )
        if request.grammar is not None and self.llm.vllm_config.parallel_config.world_size > 1:
            raise MMToolError(
                "vLLM on several GPUs cannot follow a grammar of mmtool", "Ask without one, or use one GPU."
            )

    def step(self) -> None:
        """Advance every request; see ``Engine.step``."""
        while self._waiting:
            self._begin(self._waiting.popleft())
        if not self._started:
            return
        self.stats.decode_steps += 1
        for output in self.llm.step():
            run = self._started.get(output.request_id)
            if run is not None:
                self._take(run, output)

    def close(self) -> None:
        """Give back memory and processes; requests under way end without a word. Another engine can start then."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.engine_core.shutdown()
        self._started.clear()
        del self.llm
        cleanup_dist_env_and_memory()

    # From SteppedEngine

    def _running(self) -> list[Run]:
        return list(self._started.values())

    def _release(self, run: Run) -> None:
        if run.slot is not None:
            self._started.pop(run.slot, None)
            self.llm.abort_request([run.slot])  # nothing happens where vLLM has ended it as well
            run.slot = None

    # Requests and outputs

    def _begin(self, run: Run) -> None:
        self._count += 1
        name = f"mmtool-{self._count}"
        request = run.request
        adapter = request.adapter or self._default_adapter
        try:
            run.slot = name
            self._started[name] = run
            self.llm.add_request(
                name,
                _engine_input(request),
                _sampling_params(request, run.max_new_tokens, self.vocab_size),
                lora_request=self._loras.get(adapter),
            )
        except Exception as error:
            self._fail(run, error if isinstance(error, MMToolError) else MMToolError(f"vLLM: {error}"))
            return
        new = {item.key for item in request.media} - self._seen.keys()
        self._seen |= dict.fromkeys(new)
        while len(self._seen) > MOST_SEEN:
            del self._seen[next(iter(self._seen))]
        run.num_features = len(new)
        self.stats.vision_runs += len(new)
        self.stats.feature_hits += len(request.media) - len(new)

    def _take(self, run: Run, output: Any) -> None:
        (answer,) = output.outputs
        if not run.token_ids and answer.token_ids:
            run.cached_tokens = output.num_cached_tokens or 0
            self.stats.cached_tokens += run.cached_tokens
            self.stats.prefill_tokens += len(run.request.input_ids) - run.cached_tokens
            run.prompt_logprobs = _prompt_logprobs(run.request, output.prompt_logprobs or ())
        wanted = run.request.sampling.logprobs
        for index, token_id in enumerate(answer.token_ids):
            self.stats.decode_tokens += 1
            logprob = None if wanted is None else _token_logprob(token_id, answer.logprobs[index], wanted)
            self._publish(run, token_id, logprob)
            if run.finished:
                return
        if output.finished:  # by vLLM alone, which is never the end of an answer
            self._fail(run, MMToolError(f"vLLM ended a request early: {answer.finish_reason}"))


def import_vllm() -> Any:
    """Import vLLM, set to run its engine in this process.

    Raises:
        MMToolError: when it is not installed.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # answers alone go to stdout
    try:
        import vllm
    except ImportError as error:
        raise MMToolError(
            f"--infer_backend vllm needs the package vllm ({error})",
            "pip install 'mmtool[vllm]'; without a GPU: examples/vllm/make_env.sh FOLDER",
        ) from None
    return vllm


def _start(spec: ModelSpec, folder: Path, settings: VllmSettings) -> Any:
    from vllm import ModelRegistry
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    if CONFIG_KEY in read_json(folder / "config.json"):
        raise MMToolError(
            f"{folder} has weights quantised by `mmtool export --quant_method`, which vLLM cannot read",
            "Leave --infer_backend out, or give the folder that was exported.",
        )
    own = [name for name in _OWN_ARGS if name in settings.more]
    if own:
        raise MMToolError(f"--vllm_args: {own[0]} is set by mmtool", "Leave it out.")
    given: dict[str, Any] = {
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len or -1,  # as many as the model and the memory allow
        "max_num_seqs": settings.max_batch_size,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "generation_config": "vllm",  # sampling comes with the requests
        "mm_processor_cache_gb": 0,  # the template keeps what it has prepared
        "disable_log_stats": True,
        "async_scheduling": False,  # a grammar needs each token before the next is chosen
        **_lora_args(settings.adapters),
        **settings.more,
    }
    given = {name: value for name, value in given.items() if value is not None}
    own_class = _own_class(spec)
    if own_class is not None:
        # The class itself: for a name alone, vLLM starts a process to find out what it can do.
        ModelRegistry.register_model(own_class.__name__, own_class)
    try:
        arguments = EngineArgs(
            model=str(folder),
            hf_overrides={} if own_class is None else {"architectures": [own_class.__name__]},
            logits_processors=["mmtool.engine.vllm_logits:RequestLogits"],
            **given,
        )
    except TypeError as error:
        raise MMToolError(f"--vllm_args: {error}", "The names are those of vllm.EngineArgs.") from None
    try:
        return LLMEngine.from_engine_args(arguments)
    except (ValueError, NotImplementedError, RuntimeError) as error:  # how vLLM refuses a model, or a machine
        raise MMToolError(f"vLLM cannot run {folder}: {_said(error)}") from error


def _own_class(spec: ModelSpec) -> Any:
    """Return the class of ours that runs a model in vLLM; None for a text model of transformers, which vLLM knows."""
    known = architectures().get(spec.model_class.partition(":")[2])
    if known is None and spec.modalities:
        raise MMToolError(
            f"--infer_backend vllm takes {' and '.join(spec.modalities)} input for mmtool's own families only",
            "Leave --infer_backend out, or use vLLM's own server.",
        )
    return None if known is None else import_object(known)


def _said(error: Exception) -> str:
    """Return what vLLM says is wrong, without the marks of the package that checks its settings."""
    details = error.errors() if hasattr(error, "errors") else ()
    return "; ".join(detail["msg"] for detail in details) or str(error)


def _kv_bytes(llm: Any) -> int:
    core = llm.engine_core.engine_core
    return sum(tensor.size for tensor in core.scheduler.kv_cache_config.kv_cache_tensors)


def _engine_input(request: Request) -> dict[str, Any]:
    """Return a prompt as vLLM's renderer would: ids, and for each medium its tensors, its hash and its place."""
    from vllm.inputs.engine import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalKwargsItems

    if not request.media:
        return tokens_input(request.input_ids)
    kinds = dict.fromkeys(item.kind for item in request.media)
    media = {kind: [item for item in request.media if item.kind == kind] for kind in kinds}
    return mm_input(
        request.input_ids,
        MultiModalKwargsItems({kind: [_fields(item) for item in items] for kind, items in media.items()}),
        {kind: [item.key for item in items] for kind, items in media.items()},
        {kind: [_place(item) for item in items] for kind, items in media.items()},
    )


def _fields(item: MediaInput) -> Any:
    from vllm.multimodal.inputs import (
        MultiModalBatchedField,
        MultiModalFieldElem,
        MultiModalKwargsItem,
    )

    each = MultiModalBatchedField()
    tensors = {**item.inputs, "mmtool_medium": torch.tensor(1)}
    return MultiModalKwargsItem({name: MultiModalFieldElem(tensor, each) for name, tensor in tensors.items()})


def _place(item: MediaInput) -> Any:
    from vllm.multimodal.inputs import PlaceholderRange

    if item.feature_index is None:
        return PlaceholderRange(item.start, item.length)
    holds = torch.zeros(item.length, dtype=torch.bool)
    holds[list(item.feature_index)] = True
    return PlaceholderRange(item.start, item.length, holds)


def _sampling_params(request: Request, max_new_tokens: int, vocab_size: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = request.sampling
    unseen_prompt = sampling.repetition_penalty != 1 and not request.penalize_prompt
    extra = {}
    if unseen_prompt:
        extra["mmtool_answer_penalty"] = sampling.repetition_penalty
    if request.grammar is not None:
        extra["mmtool_grammar"] = request.grammar
    return SamplingParams(
        max_tokens=max_new_tokens,
        min_tokens=min(sampling.min_new_tokens, max_new_tokens),
        temperature=0.0 if sampling.greedy else sampling.temperature,
        top_p=1.0 if sampling.greedy else sampling.top_p,
        top_k=0 if sampling.greedy else min(sampling.top_k, vocab_size),
        min_p=0.0 if sampling.greedy else sampling.min_p,
        repetition_penalty=1.0 if unseen_prompt else sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        seed=sampling.seed,
        logprobs=sampling.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        stop_token_ids=[] if sampling.ignore_eos else list(request.stop_token_ids),
        ignore_eos=True,  # the stop ids above are all that end an answer
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=extra or None,
        skip_clone=True,  # made for this request; a copy of its grammar would stand still
    )


def _token_logprob(token_id: int, found: Mapping[int, Any], wanted: int) -> TokenLogprob:
    likeliest = sorted(found.items(), key=lambda pair: pair[1].rank)
    top = tuple((index, entry.logprob) for index, entry in likeliest if entry.rank <= wanted)[:wanted]
    return TokenLogprob(token_id, found[token_id].logprob, top)


def _prompt_logprobs(request: Request, found: Sequence[Any]) -> list[TokenLogprob]:
    """Return those of all tokens of a prompt but the first, which has none."""
    wanted = request.prompt_logprobs
    if wanted is None:
        return []
    pairs = zip(request.input_ids[1:], found[1:], strict=True)
    return [_token_logprob(token_id, entries, wanted) for token_id, entries in pairs]


# -- adapters --------------------------------------------------------------------------------------------------------


def _lora_args(adapters: Mapping[str, Path]) -> dict[str, Any]:
    if not adapters:
        return {}
    ranks = [_adapter_config(path).get("r", 8) for path in adapters.values()]
    sizes = (8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM has
    rank = next((size for size in sizes if size >= max(ranks)), None)
    if rank is None:
        raise MMToolError(f"vLLM takes adapters up to rank {sizes[-1]}, not {max(ranks)}", "Merge it: mmtool export.")
    from vllm.platforms import current_platform

    # Without a GPU, requests that have no adapter get what lies in the last place: nothing, if there is one to spare.
    places = len(adapters) + current_platform.is_cpu()
    return {"enable_lora": True, "max_lora_rank": rank, "max_loras": places}


def _lora_requests(spec: ModelSpec, adapters: Mapping[str, Path]) -> dict[str | None, Any]:
    """Return vLLM's requests for adapters by name; MMToolError for one that it cannot apply."""
    from vllm.lora.request import LoRARequest

    for name, path in adapters.items():
        _check_adapter(spec, name, path)
    return {name: LoRARequest(name, number, str(path)) for number, (name, path) in enumerate(adapters.items(), 1)}


def _check_adapter(spec: ModelSpec, name: str, folder: Path) -> None:
    config = _adapter_config(folder)
    problem = None
    if config.get("use_dora"):
        problem = "is a DoRA adapter"
    elif config.get("modules_to_save"):
        problem = f"holds whole modules ({', '.join(config['modules_to_save'])})"
    else:
        parts = tuple(f"base_model.model.{prefix}." for prefix in spec.parts.get("llm", ()))
        outside = [key for key in _adapter_names(folder) if not key.startswith(parts)]
        if outside:
            problem = f"changes more than the language model ({outside[0]})"
    if problem is not None:
        raise MMToolError(
            f"adapter {name!r} ({folder}) {problem}, which vLLM cannot add to requests",
            "Merge it into the weights with `mmtool export --merge_lora true`, and serve the result.",
        )


def _adapter_names(folder: Path) -> list[str]:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise MMToolError(f"{folder} has no adapter_model.safetensors")
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _adapter_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "adapter_config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise MMToolError(f"{folder} is not a LoRA adapter: {error}") from None
