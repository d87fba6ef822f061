"""The engine for whatever transformers can generate with: the model's own ``forward`` and cache, one request a call.

``GenericEngine`` prepares its calls as ``generate`` does, so greedy answers are the same; beyond that it keeps the
caches of conversations and the features of media for the next request. Requests take turns, token by token.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from mmtool.engine.base import Request, TokenLogprob
from mmtool.engine.features import TOWERS
from mmtool.engine.positions import joined_inputs, position_limit, token_tensors
from mmtool.engine.sampling import SCORED_TOGETHER, RowError, Sampler, logprobs_of
from mmtool.engine.slots import common_prefix
from mmtool.engine.stepped import Run, SteppedEngine
from mmtool.errors import MMToolError

if TYPE_CHECKING:
    from mmtool.engine.adapters import Adapters
    from mmtool.template.base import MediaInput

SCORED_BYTES = 2 * 2**30  # of logits, which a model gives for all of a prompt at once
_CACHE_NAMES = ("past_key_values", "cache_params")  # the second is that of state space models


class Conversation:
    """A cache, which content its positions hold, and who uses it."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.tokens: list[int] = []
        self.adapter: str | None = None  # which they were computed with
        self.positions: Tensor | None = None  # numbers of all positions, ``(..., 1, length)``, if the model takes them
        self.fields: dict[str, Tensor] = {}  # what the model wants to know of each position beside the id
        self.run: Run | None = None
        self.last_used = 0


class GenericEngine(SteppedEngine):
    """Drives a model as ``generate`` does, and computes nothing twice where its cache can be cut back.

    Args:
        model: a head class of transformers with ``generate``, on its device.
        tokenizer: only its ``decode`` is used.
        max_batch_size: most requests at once, and most conversations kept.
        max_model_len: most positions of prompt and answer; the model's own limit by default.
        adapters: folders of LoRA adapters by the name that requests choose them by.
        feature_cache_bytes: how much of media features is kept, where the model takes features.
        reuse_prefix: whether computed prompts are used again.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_batch_size: int = 1,
        max_model_len: int | None = None,
        adapters: Mapping[str, Path] | None = None,
        feature_cache_bytes: int = 256 * 2**20,
        reuse_prefix: bool = True,
    ) -> None:
        limit = position_limit(model.config.get_text_config())
        if max_model_len is not None and not 1 < max_model_len <= limit:
            raise MMToolError(f"--max_model_len {max_model_len}: this model takes 2 to {limit}", "Or leave it out.")
        super().__init__(model, tokenizer, max_batch_size, max_model_len or limit)
        self.vocab_size = model.config.get_text_config().vocab_size
        self._load_adapters(adapters)
        self.takes = set(inspect.signature(model.forward).parameters)
        self.cache_name = next((name for name in _CACHE_NAMES if name in self.takes), None)
        if self.cache_name is None or not model._supports_default_dynamic_cache():
            raise MMToolError(f"{type(model).__name__} has no cache of a kind that mmtool knows")
        self.device = model.get_input_embeddings().weight.device
        self.features = EncoderOutputs(model, self.takes, feature_cache_bytes, self._adapters)
        self.can_cut = reuse_prefix and _can_cut(self._new_cache())
        self.conversations: list[Conversation] = []
        self._clock = 0

    def check(self, request: Request) -> None:
        """Raise MMToolError for a request that can never run; see ``Engine.check``."""
        super().check(request)
        most = SCORED_BYTES // (self.vocab_size * self.model.dtype.itemsize)
        if request.prompt_logprobs is not None and len(request.input_ids) > most:
            raise MMToolError(f"prompt_logprobs: the prompt has {len(request.input_ids)} positions, the most is {most}")

    @torch.inference_mode()
    def step(self) -> None:
        """Continue every answer by one token, let requests in and compute their prompts."""
        answering = [run for run in self._running() if run.token_ids]
        for run in answering:
            self._attempt(run, self._decode)
        self.stats.decode_steps += bool(answering)
        self.stats.decode_tokens += len(answering)
        while self._waiting and len(self._running()) < self.max_batch_size:
            run = self._waiting.popleft()
            self._attempt(run, self._prefill)

    def clear(self, features: bool = False) -> None:
        """Forget all conversations and give their memory back; also forget media features if asked."""
        for run in self._unfinished():
            self.cancel(run)
        self.conversations.clear()
        if features:
            self.features.clear()

    @property
    def kv_bytes(self) -> int:
        """Memory for keys and values, as it is allocated now."""
        layers = [layer for conversation in list(self.conversations) for layer in _layers(conversation.cache)]
        tensors = [value for layer in layers for value in vars(layer).values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in tensors)

    def _running(self) -> list[Run]:
        return [conversation.run for conversation in self.conversations if conversation.run is not None]

    def _release(self, run: Run) -> None:
        if run.slot is not None:
            self._clock += 1
            run.slot.run, run.slot.last_used = None, self._clock
            run.slot = None

    def _attempt(self, run: Run, advance: Any) -> None:
        """Advance a run; what goes wrong ends this run alone, and its conversation, whose cache may be half written."""
        adapted = nullcontext()
        if self._adapters is not None:
            adapted = self._adapters.chosen(self._adapters.choice_of([run.request.adapter]))
        try:
            with adapted:
                token_id, logprob = advance(run)
        except Exception as error:
            if run.slot is not None:
                self.conversations.remove(run.slot)
            self._fail(run, error.error if isinstance(error, RowError) else error)
        else:
            self._publish(run, token_id, logprob)

    # Prompts

    def _prefill(self, run: Run) -> tuple[int, TokenLogprob | None]:
        conversation, start = self._place(run)
        run.cached_tokens = start
        self.stats.cached_tokens += start
        request, length = run.request, len(run.prompt)
        ids = torch.tensor([request.input_ids], device=self.device)
        fields = token_tensors(request.media, length, self.device)
        fields = {name: value for name, value in fields.items() if name in self.takes}
        everything = joined_inputs(request.media, self.device, self.model.dtype)
        conversation.fields = fields
        conversation.positions = self._positions(ids, fields | everything)
        media = [item for item in request.media if item.start + item.length > start]
        new_media, fresh = self.features.inputs(media, self.device, run.request.adapter)
        self._count(run, media, fresh)
        scored = request.prompt_logprobs
        keep = 1 if scored is None else length
        logits = self._forward(conversation, ids, length - start, first=True, keep=keep, **new_media)
        conversation.tokens = list(run.prompt)
        self.stats.prefill_tokens += length - start
        if scored is not None:
            following = request.input_ids[1:]
            for first in range(0, len(following), SCORED_TOGETHER):
                some = following[first : first + SCORED_TOGETHER]
                run.prompt_logprobs += logprobs_of(logits[first : first + len(some)], some, scored)
        run.draw = self._draw_for(run, logits.shape[-1], self.device)
        return self._sample(run, logits[-1:])

    def _count(self, run: Run, media: Sequence[MediaInput], fresh: int) -> None:
        run.num_features = fresh
        self.stats.vision_calls += fresh
        self.stats.vision_runs += fresh
        self.stats.feature_hits += len(media) - fresh

    def _place(self, run: Run) -> tuple[Conversation, int]:
        """Give a run a conversation, and return how much of its prompt is in its cache."""
        free = [conversation for conversation in self.conversations if conversation.run is None]
        donor, shared = self._donor(run)
        room = len(self.conversations) < self.max_batch_size
        if donor in free and (2 * shared >= len(donor.tokens) or not room):
            target = donor
        else:  # rather forget an old conversation than most of the one that begins alike
            cache = self._new_cache() if donor is None else copy.deepcopy(donor.cache)
            target = Conversation(cache)
            target.tokens = [] if donor is None else donor.tokens
            if not room:
                self.conversations.remove(min(free, key=lambda conversation: conversation.last_used))
            self.conversations.append(target)
        if len(target.tokens) > shared:
            target.cache.crop(shared - len(target.tokens))
        target.tokens = target.tokens[:shared]
        target.adapter = run.request.adapter
        target.run, run.slot = run, target
        return target, shared

    def _donor(self, run: Run) -> tuple[Conversation | None, int]:
        """Return the conversation that shares most positions with a prompt, and how many: never all, nor half a medium.

        Where the positions of a medium see each other, a cut inside it would be wrong.
        """
        best, length = None, 0
        usable = self.can_cut and run.request.prompt_logprobs is None  # those are made of states, which are not kept
        for conversation in self.conversations if usable else ():
            if conversation.adapter != run.request.adapter:
                continue
            shared = min(common_prefix(conversation.tokens, run.prompt), len(run.prompt) - 1)
            for item in run.request.media:
                if item.start < shared < item.start + item.length:
                    shared = item.start
            if shared > length:
                best, length = conversation, shared
        return best, length

    def _positions(self, ids: Tensor, inputs: dict[str, Tensor]) -> Tensor | None:
        """Return the numbers of the positions of a whole prompt as ``generate`` finds them."""
        if "position_ids" not in self.takes:
            return None
        known = inputs | {"attention_mask": torch.ones_like(ids)}
        return self.model._prepare_position_ids_for_generation(ids, known)

    # Answers

    def _decode(self, run: Run) -> tuple[int, TokenLogprob | None]:
        conversation = run.slot
        fed = run.token_ids[-1]
        length = len(conversation.tokens) + 1
        if conversation.positions is not None:
            last = conversation.positions[..., -1:]
            conversation.positions = torch.cat((conversation.positions, last + 1), dim=-1)
        for name, row in conversation.fields.items():
            conversation.fields[name] = torch.nn.functional.pad(row, (0, 1))
        ids = torch.tensor([[fed]], device=self.device)
        tokens, conversation.tokens = conversation.tokens, []  # not valid while the cache is being written
        logits = self._forward(conversation, ids, 1, first=False, length=length)
        conversation.tokens = [*tokens, fed]
        return self._sample(run, logits)

    def _sample(self, run: Run, logits: Tensor) -> tuple[int, TokenLogprob | None]:
        sampler = Sampler([run.draw], self.device)
        token_ids = sampler(logits.float()).tolist()
        return token_ids[0], sampler.logprobs(token_ids)[0]

    def _forward(
        self,
        conversation: Conversation,
        ids: Tensor,
        new: int,
        first: bool,
        length: int = 0,
        keep: int = 1,
        **media: Any,
    ) -> Tensor:
        """Run the model over the last ``new`` of ``ids``; return the logits of the last ``keep``, ``(keep, vocab)``."""
        length = length or ids.shape[1]
        known: dict[str, Any] = {self.cache_name: conversation.cache, "use_cache": True, **conversation.fields, **media}
        known["attention_mask"] = torch.ones(1, length, dtype=torch.long, device=self.device)
        if conversation.positions is not None:
            known["position_ids"] = conversation.positions
        if "logits_to_keep" in self.takes:
            known["logits_to_keep"] = keep
        inputs = self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=new, is_first_iteration=first, **known
        )
        outputs = self.model(**inputs, return_dict=True)
        cache = outputs.get(self.cache_name)
        conversation.cache = conversation.cache if cache is None else cache
        return outputs.logits[0, -keep:].to(self.device)

    def _new_cache(self) -> Any:
        """Return an empty cache, with layers that keep every position where that is possible.

        Layers with a sliding window could drop what is outside of it, but then they could not be cut back; the masks
        of the model hide those positions.
        """
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
            cache.layers = [DynamicLayer() for _ in cache.layers]
        return cache


class EncoderOutputs:
    """Runs the towers of a model whose ``forward`` takes what they give, and keeps that by content.

    For other models the tensors of the media go into ``forward`` as they are.
    """

    def __init__(self, model: Any, takes: set[str], max_bytes: int, adapters: Adapters | None = None) -> None:
        self.model = model
        self.adapters = adapters
        self.kinds = [kind for kind in ("image",) if "mm_encoder_outputs" in takes and hasattr(model, TOWERS[kind])]
        self.max_bytes = max_bytes
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def clear(self) -> None:
        """Drop everything."""
        self._kept.clear()

    def inputs(
        self, media: Sequence[MediaInput], device: torch.device, adapter: str | None = None
    ) -> tuple[dict[str, Any], int]:
        """Return what ``forward`` gets for ``media``, and how many of them go through a tower for it."""
        raw = [item for item in media if item.kind not in self.kinds]
        outputs: dict[str, Any] = {}
        keys = [item.key if self.adapters is None else self.adapters.media_key(item.key, adapter) for item in media]
        pairs = list(zip(media, keys, strict=True))
        fresh = {key for item, key in pairs if key not in self._kept or item.kind not in self.kinds}
        for kind in self.kinds:
            own = [self._encode(item, key, device) for item, key in pairs if item.kind == kind]
            if own:
                outputs[kind] = _joined_outputs(own)
        inputs: dict[str, Any] = joined_inputs(raw, device, self.model.dtype)
        if outputs:
            inputs["mm_encoder_outputs"] = outputs
        return inputs, len(fresh)

    def _encode(self, item: MediaInput, key: str, device: torch.device) -> Any:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        tower = getattr(self.model, TOWERS[item.kind])
        output = tower(**joined_inputs([item], device, self.model.dtype), return_dict=True)
        names = ("pooler_output", "deepstack_features")  # all that a forward reads of it
        output = type(output)(**{name: output[name] for name in names if output.get(name) is not None})
        self._kept[key] = output
        while len(self._kept) > 1 and sum(map(_num_bytes, self._kept.values())) > self.max_bytes:
            self._kept.popitem(last=False)
        return output


def _joined_outputs(outputs: Sequence[Any]) -> Any:
    """Return the outputs of a tower for several media as if it had run over all of them."""
    if len(outputs) == 1:
        return outputs[0]
    joined = {"pooler_output": _joined([output.pooler_output for output in outputs])}
    if outputs[0].get("deepstack_features") is not None:
        layers = zip(*(output.deepstack_features for output in outputs), strict=True)
        joined["deepstack_features"] = [_joined(layer) for layer in layers]
    return type(outputs[0])(**joined)


def _joined(features: Sequence[Any]) -> Any:
    if isinstance(features[0], Tensor):
        return torch.cat(list(features))
    return [rows for item in features for rows in item]


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    values = value.values() if hasattr(value, "values") else value
    return sum(map(_num_bytes, values))


def _layers(cache: Any) -> Sequence[Any]:
    return cache.layers if isinstance(cache, DynamicCache) else ()  # others count for nothing


def _can_cut(cache: Any) -> bool:
    """Whether a cache can forget its last positions: it holds keys and values of all."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)
