"""The network to train: loaded, with adapters or unfrozen weights, in the right numbers."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import shutil
import wave
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from mmtool import log
from mmtool.args import SftArgs
from mmtool.errors import MMToolError
from mmtool.loader import fit_layout, load_model
from mmtool.messages import Audio, Image, Part
from mmtool.sft.batches import MediaBatch, media_batch
from mmtool.sft.checkpoint import load_trained
from mmtool.sft.features import open_features
from mmtool.sft.learner import Learner
from mmtool.sft.llama_pass import pass_for
from mmtool.sft.lora import PEFT_PREFIX, add_adapters
from mmtool.sft.parts import PartNames, PartRow, choose_ways, count_parts, parts_summary, set_trainable
from mmtool.sft.run import Run
from mmtool.spec import ModelSpec
from mmtool.template.base import Template

logger = log.get_logger(__name__)

# The parts that media of a kind run through.
PARTS_OF_KIND = {"image": ("vision_encoder", "vision_proj"), "audio": ("audio_encoder", "audio_proj")}


@dataclass(frozen=True)
class Network:
    """What trains.

    Attributes:
        learner: the module for Trainer.
        dtype: of the loaded weights: 16 bits mean mixed precision.
        table: parts and their numbers of parameters.
        may_skip_parameters: whether a pass may leave out parameters that train.
    """

    learner: Learner
    dtype: torch.dtype
    table: list[PartRow]
    may_skip_parameters: bool

    @property
    def summary(self) -> dict[str, Any]:
        """The table as data."""
        return parts_summary(self.table)


def load_network(run: Run, template: Template) -> Network:
    """Load the weights and set up what trains; ``template`` encodes the media of ranks that have none."""
    args, spec = run.args, run.spec
    check_kernels(args, run.use_cpu)
    if spec.layout is None:  # else the network tells the parts: see below
        choose_ways(args.parts, args.tuner.sft_type, spec.parts)
    with log.timed("load"):
        model = _load(run, template)
    spec = fit_layout(spec, model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    trained = _choose_trained(model, spec, args)
    _checkpoint_activations(model, args, run.use_cpu)
    if args.devices.use_liger_kernel:
        use_liger(model.get_decoder())
    prefix = PEFT_PREFIX if trained is not model else ""
    table = count_parts(trained, PartNames(spec.parts), prefix)
    trained_parts = {row.part for row in table if row.trained}
    learner = _make_learner(model, trained, spec, trained_parts, run, template)
    if run.resumed is not None:
        load_trained(learner, run.resumed)
    # Towers have layers behind the one whose output is taken; all else takes part in every pass.
    skips = any(row.trained and row.part.endswith("_encoder") for row in table)
    return Network(learner, dtype, table, skips)


def _load(run: Run, template: Template) -> Any:
    args = run.args
    unset_hf_deepspeed_config()  # of an earlier run in this process; whole weights load, and are shared out afterwards
    keywords = dict(args.model.model_kwargs or {})
    if args.tuner.quantization_bit != "0":
        keywords["quantization_config"] = quantization(args.tuner.quantization_bit, run.spec)
    if args.model.device_map is not None:
        device_map: Any = args.model.device_map
    elif run.use_cpu or args.devices.deepspeed or args.devices.fsdp:
        device_map = "cpu"
    else:
        device_map = f"cuda:{run.ranks.local_rank}"
    full = args.tuner.sft_type == "full"
    model, _ = load_model(
        run.spec,
        run.resumed if run.resumed is not None and full else run.weights,
        dtype=args.model.dtype,
        device_map=device_map,
        attn_impl=args.model.attn_impl,
        model_kwargs=keywords,
        processor=template.processor,
    )
    return model


def _choose_trained(model: Any, spec: ModelSpec, args: SftArgs) -> Any:
    """Return the model, with adapters on it or with those weights unfrozen that train."""
    ways = choose_ways(args.parts, args.tuner.sft_type, spec.parts)
    if args.tuner.sft_type == "lora":
        trained = add_adapters(model, spec, ways, args.tuner, args.parts)
    else:
        trained = model
        set_trainable(model, ways, PartNames(spec.parts), args.parts)
    if args.devices.deepspeed is None and args.devices.fsdp is None:
        for parameter in trained.parameters():  # steps of 1e-5 get lost in 16 bits; DeepSpeed keeps its own copy
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return trained


def _make_learner(
    model: Any, trained: nn.Module, spec: ModelSpec, trained_parts: set[str], run: Run, template: Template
) -> Learner:
    kinds = [kind for kind in PARTS_OF_KIND if kind in spec.modalities]
    training = {kind for kind in kinds if trained_parts.intersection(PARTS_OF_KIND[kind])}
    needs_all = [kind for kind in kinds if run.ranks.world_size > 1 and (run.sharded or kind in training)]
    cache = run.args.train.cache_media_features
    return Learner(
        trained,
        frozen_kinds=[kind for kind in kinds if kind not in training],
        # Ranks that hold pieces of a tower must run it together, so none may skip it.
        cache=None if run.sharded else open_features(cache, run.folder, run.ranks.local_world_size),
        dummies={kind: _dummy(template, kind) for kind in needs_all},
        frozen_modules=_frozen_modules(model, spec, trained_parts),
        one_piece=run.sharded,
        layers=None if run.sharded or run.args.devices.torch_compile else pass_for(model.get_decoder()),
    )


def quantization(bits: str, spec: ModelSpec) -> Any:
    """Return the configuration of bitsandbytes: the language model in ``bits``, towers and projectors as they are.

    Raises:
        MMToolError: where it is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MMToolError(
            f"--quantization_bit {bits} needs the package bitsandbytes",
            "pip install 'mmtool[quant]', or leave the option out.",
        )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of every cast of every layer
    # Towers have a few percent of the weights, and lose more in few bits; projectors may train.
    kept = [name for part, names in spec.parts.items() if part != "llm" for name in names]
    kept.append("lm_head")
    if bits == "8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=kept,
    )


def _checkpoint_activations(model: Any, args: SftArgs, use_cpu: bool) -> None:
    wanted = args.train.gradient_checkpointing
    if wanted is None:
        wanted = not use_cpu
    if not wanted:
        return
    keywords = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name in newer transformers
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=keywords)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)


def check_kernels(args: SftArgs, use_cpu: bool) -> None:
    """Refuse what this machine has no kernels or no compiler for, before anything loads.

    Raises:
        MMToolError: naming the option and what is missing.
    """
    if args.devices.use_liger_kernel:
        if use_cpu:
            raise MMToolError(
                "--use_liger_kernel true needs a GPU", "Leave it out: mmtool has faster layers of its own for a CPU."
            )
        if importlib.util.find_spec("liger_kernel") is None:
            raise MMToolError("--use_liger_kernel true needs the package liger-kernel", "pip install liger-kernel")
    if args.devices.torch_compile:
        compiler = os.environ.get("CXX", "g++")
        if use_cpu and shutil.which(compiler) is None:
            raise MMToolError(f"--torch_compile true needs a C++ compiler; there is no {compiler}", "Install g++.")
        if not use_cpu and importlib.util.find_spec("triton") is None:
            raise MMToolError("--torch_compile true needs the package triton", "pip install triton")


def use_liger(decoder: Any) -> None:
    """Put the kernels of the package liger-kernel, which is there, into a language model.

    Raises:
        MMToolError: where it does not know the model.
    """
    from liger_kernel.transformers import monkey_patch

    known = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    if decoder.config.model_type not in known:
        raise MMToolError(
            f"--use_liger_kernel: liger-kernel does not know language models of type {decoder.config.model_type}",
            "Leave it out.",
        )
    known[decoder.config.model_type](model=decoder)


def _frozen_modules(model: nn.Module, spec: ModelSpec, trained_parts: set[str]) -> list[nn.Module]:
    """Return the modules of parts with nothing to train; they stay in evaluation mode."""
    modules = dict(model.named_modules())
    return [
        modules[name]
        for part, names in spec.parts.items()
        if part not in trained_parts and part != "llm"
        for name in names
        if name in modules
    ]


def _dummy(template: Template, kind: str) -> MediaBatch:
    """Return one medium of a kind, for a rank whose batch has none."""
    part: Part
    if kind == "image":
        part = Image(PIL.Image.new("RGB", (64, 64), "white"))
    else:
        sound = io.BytesIO()
        with wave.open(sound, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes(bytes(2 * 16000))
        part = Audio(sound.getvalue())
    (item,) = template.finish_media([template.prepare(part)])
    return media_batch([(0, item)])
