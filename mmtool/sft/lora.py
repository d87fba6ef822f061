"""Adapters: which layers get one, and how peft puts them there."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from mmtool.errors import MMToolError
from mmtool.groups.sft import PartArgs, TunerArgs
from mmtool.log import get_logger
from mmtool.sft.parts import PartNames, Way, check_patterns, matches_name
from mmtool.spec import ModelSpec
from mmtool.utils import did_you_mean

logger = get_logger(__name__)

PEFT_PREFIX = "base_model.model."
_PLAIN_NAME = re.compile(r"[\w.]+")
_BOOLEANS = {"true": True, "false": False}
_INITS = re.compile(r"true|false|gaussian|olora|pissa(_niter_\d+)?|orthogonal")


def add_adapters(model: Any, spec: ModelSpec, ways: Mapping[str, Way], tuner: TunerArgs, parts: PartArgs) -> PeftModel:
    """Freeze the model and return it with new adapters, and with whole modules that train beside them."""
    check_patterns(model, parts)
    init = tuner.init_lora_weights.lower()
    if _INITS.fullmatch(init) is None:
        raise MMToolError(
            f"--init_lora_weights {tuner.init_lora_weights}: there is no such way",
            "Use true, false, gaussian, olora, pissa, pissa_niter_16 or orthogonal.",
        )
    part_of = PartNames(spec.parts)
    targets = find_targets(model, spec, ways, tuner.lora_target_modules)
    targets = [name for name in targets if not matches_name(name, parts.freeze_parameters)]
    whole = find_whole_modules(model, spec, ways, tuner.modules_to_save, parts.additional_trainable_parameters)
    targets = [name for name in targets if not any(name == other or name.startswith(f"{other}.") for other in whole)]
    if not targets:
        raise MMToolError("no layer would get an adapter", "Check --lora_target_modules and the --tune_ options.")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=tuner.lora_rank,
        lora_alpha=tuner.lora_alpha,
        lora_dropout=tuner.lora_dropout,
        init_lora_weights=_BOOLEANS.get(init, init),
        use_dora=tuner.use_dora,
        use_rslora=tuner.use_rslora,
        target_modules=targets_pattern(targets),
        modules_to_save=whole or None,
    )
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:  # such as a layer that cannot take an adapter
        raise MMToolError(f"peft cannot add these adapters: {error}", "Check the --lora_ options.") from error
    strays = [name for name in lora_modules(adapted) if name not in set(targets)]
    assert not strays, f"adapters at {strays[:3]}, which were not asked for"
    _freeze(adapted, parts, part_of)
    if init.startswith("pissa_niter"):
        adapted.drawn_adapter = {name: tensor.detach().cpu().clone() for name, tensor in _matrices(adapted).items()}
    return adapted


def _matrices(adapted: PeftModel) -> dict[str, Tensor]:
    weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {name: tensor for name, tensor in weights.items() if ".lora_A." in name or ".lora_B." in name}


def as_plain_lora(adapted: PeftModel, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], LoraConfig]:
    """Return what an adapter with a random start comes to beside the weights of the base, and its configuration.

    Such a start takes ``B0 A0`` out of the frozen weights; whoever loads the adapter would draw another one. As an
    adapter of twice the rank it is ``[B, -B0] [A; A0]``, beside the frozen weights as they were.
    """
    drawn, config = adapted.drawn_adapter, copy.deepcopy(adapted.peft_config["default"])
    plain = dict(weights)
    for name, start in drawn.items():
        tensor = weights[name].detach().cpu()
        is_first = ".lora_A." in name
        plain[name] = torch.cat([tensor, start if is_first else -start], dim=0 if is_first else 1)
    config.r *= 2
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2
    config.init_lora_weights = True
    return plain, config


def _freeze(adapted: PeftModel, parts: PartArgs, part_of: PartNames) -> None:
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and matches_name(_plain(name), parts.freeze_parameters):
            parameter.requires_grad_(False)


def _plain(name: str) -> str:
    """Return the name of a parameter before peft moved it into a wrapper."""
    return re.sub(r"\.(modules_to_save\.default|original_module|base_layer)\b", "", name.removeprefix(PEFT_PREFIX))


def lora_modules(adapted: nn.Module) -> list[str]:
    """Return the names of the layers with an adapter."""
    found = (name.partition(".lora_A.")[0] for name, _ in adapted.named_parameters() if ".lora_A." in name)
    return list(dict.fromkeys(name.removeprefix(PEFT_PREFIX) for name in found))


def targets_pattern(targets: Sequence[str]) -> str:
    """Return one expression that fits the targets and nothing else: peft takes names for suffixes otherwise.

    Numbers of layers are gathered, so that ``adapter_config.json`` stays short.
    """
    groups: dict[str, list[str]] = {}
    for name in targets:
        number = re.search(r"\.(\d+)(?=\.|$)", name)
        shape = name if number is None else f"{name[: number.start(1)]}\0{name[number.end(1) :]}"
        groups.setdefault(shape, []).append("" if number is None else number[1])
    by_numbers: dict[tuple[str, ...], list[str]] = {}
    for shape, numbers in groups.items():
        by_numbers.setdefault(tuple(numbers), []).append(shape)
    alternatives = []
    for numbers, shapes in by_numbers.items():
        choice = f"({'|'.join(numbers)})" if len(numbers) > 1 else numbers[0]
        alternatives += [re.escape(shape).replace(re.escape("\0"), choice) for shape in shapes]
    return "|".join(f"({alternative})" for alternative in alternatives)


def find_targets(model: nn.Module, spec: ModelSpec, ways: Mapping[str, Way], asked: Sequence[str]) -> list[str]:
    """Return the names of the linear layers that get an adapter, all of them in parts that train with adapters.

    Args:
        model: the network.
        spec: its registry entry.
        ways: how the parts train.
        asked: ``--lora_target_modules``.

    Raises:
        MMToolError: for a name or an expression that fits no linear layer there.
    """
    part_of = PartNames(spec.parts)
    head = _head_names(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in head]
    never = _never_trained(model)
    linear = [name for name in linear if name not in never]
    inside = [name for name in linear if ways.get(part_of(name)) == "lora"]
    if not asked or asked == ["DEFAULT"]:
        pattern = re.compile(spec.lora_target_modules)
        return [name for name in inside if part_of(name) != "llm" or pattern.fullmatch(name)]
    if [word.upper() for word in asked] in (["ALL"], ["ALL-LINEAR"]):
        return inside
    found: dict[str, None] = {}
    for word in asked:
        hits = [name for name in linear if _fits(name, word)]
        kept = [name for name in hits if ways.get(part_of(name)) == "lora"]
        if not kept:
            raise _no_layer(word, hits, inside, part_of)
        left = {part_of(name) for name in hits} - {part_of(name) for name in kept}
        if left:
            logger.info(
                "--lora_target_modules %s also fits layers of %s, which is frozen; --tune_%s lora adds them",
                word,
                ", ".join(sorted(left)),
                sorted(left)[0],
            )
        found.update(dict.fromkeys(kept))
    return [name for name in linear if name in found]


def _never_trained(model: nn.Module) -> set[str]:
    """Return the names of linear layers that the network itself does not train, such as those of tasks switched off."""
    linear = ((name, module.weight) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {name for name, weight in linear if weight.is_floating_point() and not weight.requires_grad}


def _fits(name: str, word: str) -> bool:
    if _PLAIN_NAME.fullmatch(word):
        return name == word or name.endswith(f".{word}")
    try:
        return re.fullmatch(word, name) is not None
    except re.error as error:
        raise MMToolError(
            f"--lora_target_modules {word!r} is no regular expression: {error}", "Name layers, such as q_proj v_proj."
        ) from error


def _no_layer(word: str, hits: Sequence[str], inside: Sequence[str], part_of: PartNames) -> MMToolError:
    if hits:
        part = part_of(hits[0])
        return MMToolError(
            f"--lora_target_modules {word} fits layers of {part} only, which has no adapters",
            f"Add --tune_{part} lora.",
        )
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in inside)
    return MMToolError(
        f"--lora_target_modules {word} fits no linear layer",
        did_you_mean(word, leaves, f"There are {', '.join(leaves)}."),
    )


def find_whole_modules(
    model: nn.Module, spec: ModelSpec, ways: Mapping[str, Way], asked: Sequence[str], additional: Sequence[str]
) -> list[str]:
    """Return the names of modules that train as a whole beside the adapters, none inside another.

    They are the parts in the way ``full``, those asked for (a name or the end of one), and those whose parameters are
    all named by ``additional``.
    """
    modules = dict(model.named_modules())
    names = [prefix for part, way in ways.items() if way == "full" for prefix in spec.parts[part] if prefix in modules]
    for word in asked:
        hits = [name for name in modules if name == word or name.endswith(f".{word}")]
        if not hits:
            raise MMToolError(
                f"--modules_to_save {word} is no module of the model", "Name one, such as embed_tokens or lm_head."
            )
        names += hits
    for pattern in additional:
        hits = [
            name
            for name, module in modules.items()
            if name and (own := [f"{name}.{inner}" for inner, _ in module.named_parameters()])
            if all(matches_name(parameter, [pattern]) for parameter in own)
        ]
        if not hits:
            raise MMToolError(
                f"--additional_trainable_parameters {pattern} names single parameters, not a module",
                "Beside adapters whole modules train: name a module, or use --sft_type full.",
            )
        names += hits
    names = list(dict.fromkeys(names))
    outer = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    for name in outer:
        if any(other != name and other.endswith(f".{name}") for other in modules):
            raise MMToolError(f"{name} is the end of another module's name as well, which peft cannot tell apart")
    return outer


def _head_names(model: Any) -> set[str]:
    head = model.get_output_embeddings()
    return {name for name, module in model.named_modules() if module is head}
