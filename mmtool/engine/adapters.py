"""Several LoRA adapters on one model at the same time: every row of a batch uses its own, or none.

The layers of the model stay what they are; a hook adds what an adapter adds to the output of a layer. The low-rank
pairs of all adapters of a layer lie side by side, so rows of different adapters take two matrix products together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmtool.engine.products import Product
from mmtool.errors import CheckpointError, MMToolError
from mmtool.finetuned import ADAPTER_CONFIG, wrap_adapter
from mmtool.log import get_logger
from mmtool.models.common.folders import read_json

logger = get_logger(__name__)

MERGE_HINT = "Fold it into the weights with `mmtool export --ckpt_dir FOLDER --merge_lora true` and load the result."
# Settings of peft that mean more than a low-rank pair beside a layer of the model as it is: value that means no more.
PLAIN_SETTINGS: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the layer itself
}
Span = tuple[int, int]


class KindError(MMToolError):
    """An adapter of a kind that only peft runs: it changes layers, where others would add to them."""


class Choice:
    """Which adapter each row of a batch uses, as its number; None for none."""

    def __init__(self, numbers: Sequence[int | None]) -> None:
        self.numbers = list(numbers)
        self.mixed = len(set(self.numbers)) > 1
        self._masks: dict[object, Tensor] = {}

    def others(self, spans: tuple[Span, ...], device: torch.device) -> Tensor:
        """Return ``(rows, columns)`` bool, True where a column of the pairs does not belong to the row's adapter."""
        found = self._masks.get((spans, device))
        if found is None:
            found = torch.ones(len(self.numbers), spans[-1][1], dtype=torch.bool)
            for row, number in enumerate(self.numbers):
                if number is not None:
                    found[row, slice(*spans[number])] = False
            found = self._masks[spans, device] = found.to(device)
        return found


class LowRankPairs:
    """What all adapters add to one layer.

    Attributes:
        down: ``(in, columns)``, the first matrices of all adapters side by side.
        up: ``(columns, out)``, the second ones, times the adapter's factor.
        spans: which columns belong to which adapter.
    """

    def __init__(self, adapters: Adapters, layer: nn.Module, own: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        self.adapters = adapters
        some = next(iter(own.values()))[0]
        device = next(layer.parameters()).device
        ends, spans = 0, []
        for number in range(len(adapters.names)):
            rank = own[number][0].shape[0] if number in own else 0
            spans.append((ends, ends + rank))
            ends += rank
        self.spans = tuple(spans)
        ordered = [own[number] for number in sorted(own)]
        self.down = torch.cat([down.to(some.dtype) for down, _ in ordered]).t().contiguous().to(device)
        self.up = torch.cat([up.to(some.dtype) for _, up in ordered], dim=1).t().contiguous().to(device)

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Add to what a layer gave; a forward hook."""
        choice = self.adapters.choice
        return None if choice is None else self.add(inputs[0], output, choice)

    def add(self, x: Tensor, output: Tensor, choice: Choice, factor: float = 1.0) -> Tensor:
        """Return ``output`` ``(rows, ..., out)`` plus ``factor`` times what belongs to inputs ``(rows, ..., in)``.

        Raises:
            ValueError: where rows of the layer are not those of the batch.
        """
        x = x.to(self.down.dtype)
        if choice.mixed:
            if len(x) != len(choice.numbers):
                raise ValueError("a layer with adapters got other rows than the batch has")
            others = choice.others(self.spans, x.device)
            others = others.view(len(x), *[1] * (x.ndim - 2), -1)
            return _plus(output, (x @ self.down).masked_fill_(others, 0), self.up, factor)
        number = choice.numbers[0]
        if number is None or self.spans[number][0] == self.spans[number][1]:
            return output
        columns = slice(*self.spans[number])
        return _plus(output, x @ self.down[:, columns], self.up[columns], factor)


def _plus(output: Tensor, narrow: Tensor, up: Tensor, factor: float) -> Tensor:
    if narrow.ndim == 2 and narrow.dtype == output.dtype:
        return torch.addmm(output, narrow, up, alpha=factor)
    return torch.add(output, (narrow @ up).to(output.dtype), alpha=factor)


class AdaptedProduct(Product):
    """The product of layers with low-rank pairs beside them; as the plain one while nothing is chosen.

    Args:
        product: of the layers' own weights.
        pairs: for each of the layers; None where no adapter has any.
    """

    def __init__(self, product: Product, pairs: Sequence[LowRankPairs | None]) -> None:
        self.product = product
        self.pairs = pairs
        self.adapters = next(pair.adapters for pair in pairs if pair is not None)

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """See ``Product``."""
        outputs, choice = self.product(x), self.adapters.choice
        if choice is None:
            return outputs
        return [
            output if pair is None else pair.add(x, output, choice)
            for pair, output in zip(self.pairs, outputs, strict=True)
        ]

    def together(self, x: Tensor) -> Tensor:
        """See ``Product``."""
        return self.product.together(x) if self.adapters.choice is None else torch.cat([*self(x)], -1)

    def add(self, states: Tensor, x: Tensor, factor: float = 1.0) -> Tensor:
        """See ``Product``."""
        states, choice = self.product.add(states, x, factor), self.adapters.choice
        (pair,) = self.pairs
        return states if choice is None or pair is None else pair.add(x, states, choice, factor)

    @property
    def num_bytes(self) -> int:
        """Memory beside the weights of the layers."""
        return self.product.num_bytes


def adapted(product: Product, layers: Sequence[nn.Module]) -> Product:
    """Return the product of layers as it is, or with the low-rank pairs of their adapters."""
    pairs = [
        next((hook for hook in layer._forward_hooks.values() if isinstance(hook, LowRankPairs)), None)
        for layer in layers
    ]
    return product if all(pair is None for pair in pairs) else AdaptedProduct(product, pairs)


class WholeModules:
    """What stands in the place of one module: adapters that trained it as a whole bring their own."""

    def __init__(self, adapters: Adapters, module: nn.Module, own: Mapping[int, nn.Module]) -> None:
        self.adapters = adapters
        self.base: Callable[..., Any] = module.forward
        self.own = own

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Do what the module of each row's adapter does."""
        choice = self.adapters.choice
        if choice is None:
            return self.base(x, *args, **kwargs)
        if not choice.mixed:
            return self.own.get(choice.numbers[0], self.base)(x, *args, **kwargs)
        if len(x) != len(choice.numbers):
            raise ValueError("a module with adapters got other rows than the batch has")
        output = self.base(x, *args, **kwargs)
        for number, module in self.own.items():
            rows = [row for row, other in enumerate(choice.numbers) if other == number]
            if rows:
                output[rows] = module(x[rows], *args, **kwargs).to(output.dtype)
        return output


class Adapters:
    """The adapters of a model, by name. They do nothing outside of ``chosen``.

    Args:
        model: the network; its layers get hooks.
        folders: adapter folders by name.

    Attributes:
        default: number of the adapter that no name means; None for the model as it is.

    Raises:
        KindError: for an adapter of a kind that cannot stand beside others.
        CheckpointError: for one that does not fit the model.
    """

    def __init__(self, model: Any, folders: Mapping[str, Path]) -> None:
        self.names = tuple(folders)
        self.default: int | None = None
        self.choice: Choice | None = None
        self.touches_media: list[bool] = []
        decoder = model.get_decoder()
        known = decoder is not None and decoder is not model  # else nobody knows what belongs to a tower
        in_decoder = {id(module) for module in (*decoder.modules(), model.get_output_embeddings())} if known else set()
        pairs: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
        whole: dict[str, dict[int, nn.Module]] = {}
        for number, (name, folder) in enumerate(folders.items()):
            check_plain(name, folder)
            own_pairs, own_whole = read_adapter(model, name, folder)
            for layer, pair in own_pairs.items():
                pairs.setdefault(layer, {})[number] = pair
            for layer, module in own_whole.items():
                whole.setdefault(layer, {})[number] = module
            layers = [model.get_submodule(layer) for layer in (*own_pairs, *own_whole)]
            self.touches_media.append(any(id(layer) not in in_decoder for layer in layers))
        for layer, own in pairs.items():
            module = model.get_submodule(layer)
            module.register_forward_hook(LowRankPairs(self, module, own))
        for layer, modules in whole.items():
            module = model.get_submodule(layer)
            module.forward = WholeModules(self, module, modules)
        logger.debug("adapters: %s, in %d layers", ", ".join(self.names), len(pairs) + len(whole))

    def number(self, name: str | None) -> int | None:
        """Return the number of an adapter, None for none."""
        return self.default if name is None else self.names.index(name)

    def choice_of(self, names: Sequence[str | None]) -> Choice | None:
        """Return what ``chosen`` takes for rows of these adapters; None where no row has one."""
        numbers = [self.number(name) for name in names]
        return None if all(number is None for number in numbers) else Choice(numbers)

    @contextmanager
    def chosen(self, choice: Choice | None) -> Iterator[None]:
        """Let calls of the model in the block use these adapters."""
        self.choice = choice
        try:
            yield
        finally:
            self.choice = None

    def media_key(self, key: str, name: str | None) -> str:
        """Return the key of a medium's features: an adapter that changes a tower has its own."""
        number = self.number(name)
        return key if number is None or not self.touches_media[number] else f"{key}/{name}"

    def media_choice(self, name: str | None) -> Choice | None:
        """Return the choice for a tower that works for one adapter."""
        number = self.number(name)
        return None if number is None or not self.touches_media[number] else Choice([number])


def check_plain(name: str, folder: Path) -> None:
    """Raise KindError unless an adapter is low-rank pairs, and whole modules, beside the model as it is."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"adapter {name}: {folder} has no {ADAPTER_CONFIG}", "Give an adapter folder.")
    config = read_json(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise KindError(f"adapter {name}: {folder} is {config.get('peft_type')}, not LORA", MERGE_HINT)
    for setting, plain in PLAIN_SETTINGS.items():
        if config.get(setting) not in plain:
            kind = "DoRA" if setting == "use_dora" else f"{setting} {config[setting]!r}"
            raise KindError(f"adapter {name}: {folder} uses {kind}, which cannot run beside others", MERGE_HINT)


def read_adapter(model: Any, name: str, folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, nn.Module]]:
    """Return the low-rank pairs and the whole modules of an adapter, by the name of the layer they belong to.

    A pair is ``(rank, in)`` and ``(out, rank)``, the second times the adapter's factor. peft reads the adapter into the
    model, which tells all its settings apart and what does not fit; then the model is as before.
    """
    adapted = wrap_adapter(model, folder)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    whole: dict[str, nn.Module] = {}
    originals: dict[str, nn.Module] = {}
    try:
        for layer, module in adapted.get_base_model().named_modules():
            if type(module).__name__ == "ModulesToSaveWrapper":
                whole[layer] = module.modules_to_save["default"].requires_grad_(False)
                originals[layer] = module.original_module
            elif hasattr(module, "lora_A") and hasattr(module, "base_layer"):
                pairs[layer] = _pair(module, f"adapter {name}: {layer}")
    finally:
        adapted.unload()
        for layer, module in originals.items():  # peft leaves the adapter's
            model.set_submodule(layer, module)
        vars(model).pop("peft_config", None)
    return pairs, whole


def _pair(module: Any, where: str) -> tuple[Tensor, Tensor]:
    if "default" not in module.lora_A or not isinstance(module.base_layer, nn.Linear) or module.lora_variant:
        raise KindError(f"{where} is not a linear layer with a plain adapter", MERGE_HINT)
    down = module.lora_A["default"].weight.detach()
    up = module.lora_B["default"].weight.detach() * module.scaling["default"]
    if not (down.isfinite().all() and up.isfinite().all()):
        raise CheckpointError(f"{where} has numbers that are not finite")
    return down, up
