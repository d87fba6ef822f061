"""The table of models. A family adds one import and its place in ``_FAMILIES``; everything else is derived."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmtool.errors import CheckpointError, MMToolError
from mmtool.models.fm9g import spec as fm9g
from mmtool.models.fm9g4b_v import spec as fm9g4b_v
from mmtool.models.generic import spec as generic
from mmtool.models.internlm_xcomposer2 import spec as internlm_xcomposer2
from mmtool.models.megrez import spec as megrez
from mmtool.models.tiny import spec as tiny
from mmtool.models.yi_vl import spec as yi_vl
from mmtool.spec import ModelSpec
from mmtool.utils import did_you_mean, suggest

# The order counts: a folder is of the first type that it matches, and `generic` takes what no family claims.
_FAMILIES = (tiny, yi_vl, internlm_xcomposer2, fm9g, fm9g4b_v, megrez, generic)

MODELS: dict[str, ModelSpec] = {spec.model_type: spec for family in _FAMILIES for spec in family.SPECS}
TEMPLATES: dict[str, str] = {spec.template_type: spec.template_class for spec in MODELS.values()}


def get_model_spec(model_type: str) -> ModelSpec:
    """Return the entry of ``model_type``."""
    if model_type not in MODELS:
        hint = did_you_mean(model_type, MODELS, "`mmtool list models` shows all of them.")
        raise MMToolError(f"unknown model_type {model_type!r}", hint)
    return MODELS[model_type]


def get_default_template_type(model_type: str) -> str:
    """Return the name of the chat format that ``model_type`` was trained with."""
    return get_model_spec(model_type).template_type


def get_template_class(template_type: str) -> str:
    """Return the import path of the template class of ``template_type``."""
    if template_type not in TEMPLATES:
        hint = did_you_mean(template_type, TEMPLATES, "`mmtool list templates` shows all of them.")
        raise MMToolError(f"unknown template_type {template_type!r}", hint)
    return TEMPLATES[template_type]


def detect_model_type(config: Mapping[str, Any], folder: Path | str) -> str:
    """Return the type of the model whose ``config.json`` is given; ``folder`` is named in errors only."""
    named = config.get("mmtool_model_type")
    if named is not None:
        if named not in MODELS:
            hint = did_you_mean(str(named), MODELS, "Pass --model_type; `mmtool list models` shows all of them.")
            raise CheckpointError(f"{folder}: config.json names the unknown mmtool_model_type {named!r}", hint)
        return named
    try:
        for spec in MODELS.values():
            if spec.matches(config):
                return spec.model_type
    except (TypeError, AttributeError) as error:  # a text where all releases have a number, and the like
        raise CheckpointError(
            f"{folder}: config.json has a value of the wrong kind: {error}", "Compare it with the release's file."
        ) from error
    found = f"model_type {config.get('model_type')!r}, architectures {config.get('architectures')!r}"
    raise CheckpointError(
        f"cannot tell which model {folder} holds: no known type matches its config.json ({found})",
        "Pass --model_type; `mmtool list models` shows all of them.",
    )


class _ModelTypes:
    """The model types as attributes: ``ModelType.yi_vl_6b_chat == "yi-vl-6b-chat"``."""

    def __getattr__(self, name: str) -> str:
        names = {_attribute(model_type): model_type for model_type in MODELS}
        if name in names:
            return names[name]
        near = suggest(name, names) if not name.startswith("__") else None
        raise AttributeError(f"ModelType has no {name!r}" + (f"; did you mean {near}?" if near else ""))

    def __iter__(self) -> Iterator[str]:
        return iter(MODELS)

    def __len__(self) -> int:
        return len(MODELS)

    def __contains__(self, model_type: object) -> bool:
        return model_type in MODELS

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *map(_attribute, MODELS)]

    def __repr__(self) -> str:
        return f"ModelType({', '.join(MODELS)})"


def _attribute(model_type: str) -> str:
    return model_type.replace("-", "_").replace(".", "_")


ModelType = _ModelTypes()
