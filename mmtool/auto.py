"""Make transformers' Auto classes know our models, without importing transformers before the user does.

Only the public ``register`` calls of transformers are used. ``AutoConfig`` learns two names as soon as its module is
loaded, which a module finder in ``sys.meta_path`` waits for; the rest follows when a config of ours is first read.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from mmtool.models.yi_vl.spec import is_yi_vl
from mmtool.utils import import_object

_CONFIGURATION_AUTO = "transformers.models.auto.configuration_auto"
_LLAVA_CONFIG = "transformers.models.llava.configuration_llava:LlavaConfig"
_YI_VL = "mmtool.models.yi_vl"


class _YiVLConfigs:
    """What ``AutoConfig`` finds under ``yi_vl``."""

    model_type = "yi_vl"

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        register_classes()
        return import_object(f"{_YI_VL}.configuration_yi_vl:YiVLConfig")(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Return the YiVLConfig of a ``config.json``; the Auto classes know it from now on."""
        register_classes()
        return import_object(f"{_YI_VL}.configuration_yi_vl:YiVLConfig").from_dict(config_dict, **kwargs)


class _TransformersLlava(type):
    """Whatever else is asked of the class below is meant for transformers' own LlavaConfig."""

    def __getattr__(cls, name: str) -> Any:
        return getattr(import_object(_LLAVA_CONFIG), name)


class _LlavaConfigs(metaclass=_TransformersLlava):
    """What ``AutoConfig`` finds under ``llava``: Yi-VL releases say it, and transformers' LLaVA models do."""

    model_type = "llava"

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return import_object(_LLAVA_CONFIG)(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Return a YiVLConfig for a Yi-VL release, transformers' LlavaConfig for anything else."""
        if is_yi_vl(config_dict):
            return _YiVLConfigs.from_dict(config_dict, **kwargs)
        return import_object(_LLAVA_CONFIG).from_dict(config_dict, **kwargs)


def register_classes() -> None:
    """Register models and processors with the Auto classes; happens by itself when ``AutoConfig`` reads a folder."""
    auto = import_module("transformers.models.auto")
    config = import_object(f"{_YI_VL}.configuration_yi_vl:YiVLConfig")
    head = import_object(f"{_YI_VL}.modeling_yi_vl:YiVLForConditionalGeneration")
    auto.AutoModel.register(config, import_object(f"{_YI_VL}.modeling_yi_vl:YiVLModel"), exist_ok=True)
    auto.AutoModelForImageTextToText.register(config, head, exist_ok=True)
    auto.AutoModelForCausalLM.register(config, head, exist_ok=True)
    auto.AutoProcessor.register(config, import_object(f"{_YI_VL}.processing_yi_vl:YiVLProcessor"), exist_ok=True)
    image_processor = import_object(f"{_YI_VL}.processing_yi_vl:YiVLImageProcessor")
    auto.AutoImageProcessor.register(config, image_processor_classes={"pil": image_processor}, exist_ok=True)
    tokenizer = import_object("mmtool.models.common.tokenization:SentencePieceTokenizer")
    auto.AutoTokenizer.register(config, tokenizer_class=tokenizer, exist_ok=True)


def _register_configs(configuration_auto: ModuleType) -> None:
    for config in (_YiVLConfigs, _LlavaConfigs):
        configuration_auto.AutoConfig.register(config.model_type, config, exist_ok=True)


class _RegisteringLoader:
    """Load a module with its own loader, then register our configurations in it."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the module's own loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, looking as if its own loader had done so alone."""
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register_configs(module)


class _AutoConfigFinder:
    """Find the module of ``AutoConfig``; leave all others to the finders behind."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the module's spec with our loader round its own."""
        spec = PathFinder.find_spec(name, path, target) if name == _CONFIGURATION_AUTO else None
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def install() -> None:
    """Register with ``AutoConfig`` now if it is loaded, or else when it will be; may be called again."""
    if _CONFIGURATION_AUTO in sys.modules:
        _register_configs(sys.modules[_CONFIGURATION_AUTO])
    elif not any(isinstance(finder, _AutoConfigFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoConfigFinder())
