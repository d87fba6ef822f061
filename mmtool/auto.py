"""Make transformers' Auto classes know our models, without importing transformers before the user does.

Only the public ``register`` calls of transformers are used. ``AutoConfig`` learns the names of our families as soon as
its module is loaded, which a module finder in ``sys.meta_path`` waits for; the rest follows when a config of ours is
first read. What is registered stands in the ``auto`` field of each ``ModelSpec``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from mmtool.registry import MODELS
from mmtool.spec import AutoClasses
from mmtool.utils import import_object

_CONFIGURATION_AUTO = "transformers.models.auto.configuration_auto"


class _Dispatcher(type):
    """A class that ``AutoConfig`` finds under one ``model_type``.

    Releases use names that transformers uses as well (Yi-VL says ``llava``), so each ``config.json`` is handed to the
    configuration class it is meant for. Whatever else is asked of the dispatcher is meant for transformers' own class
    of that name, or for our first one where there is none.
    """

    def __new__(cls, model_type: str, owners: Iterable[AutoClasses], own_class: str | None) -> _Dispatcher:
        # AutoConfig prefers a class from elsewhere to code that a folder brings. A name of transformers' own keeps
        # what it prefers.
        module = f"transformers.models.{model_type}" if own_class else __name__
        return super().__new__(cls, "Config", (), {"model_type": model_type, "__module__": module})

    def __init__(cls, model_type: str, owners: Iterable[AutoClasses], own_class: str | None) -> None:
        super().__init__("Config", (), {})
        cls.owners = tuple(owners)
        cls.own_class = own_class

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._default()(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls._default(), name)

    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Return the configuration that a ``config.json`` is meant for; the Auto classes know its model from now on."""
        for classes in cls.owners:
            if classes.model_types[cls.model_type](config_dict):
                return register_classes(classes).from_dict(config_dict, **kwargs)
        return cls._default().from_dict(config_dict, **kwargs)

    def _default(cls) -> Any:
        if cls.own_class is not None:
            return import_object(f"transformers:{cls.own_class}")
        return register_classes(cls.owners[0])


def families() -> tuple[AutoClasses, ...]:
    """Return what the registry wants the Auto classes to know, each once."""
    return tuple({id(spec.auto): spec.auto for spec in MODELS.values() if spec.auto is not None}.values())


def register_classes(classes: AutoClasses) -> Any:
    """Register model, processor and tokenizer of one family, and return its configuration class.

    Happens by itself when ``AutoConfig`` reads a folder of the family.
    """
    config = import_object(classes.config_class)
    _auto("modeling:AutoModel").register(config, import_object(classes.base_model_class), exist_ok=True)
    for head in classes.heads:
        _auto(f"modeling:{head}").register(config, import_object(classes.model_class), exist_ok=True)
    _auto("processing:AutoProcessor").register(config, import_object(classes.processor_class), exist_ok=True)
    _auto("image_processing:AutoImageProcessor").register(
        config, image_processor_classes={"pil": import_object(classes.image_processor_class)}, exist_ok=True
    )
    _auto("tokenization:AutoTokenizer").register(config, import_object(classes.tokenizer_class), exist_ok=True)
    return config


def _auto(path: str) -> Any:
    """Return an Auto class from its own module: at the top, some are stand-ins that ask for torchvision."""
    module, name = path.split(":")
    return import_object(f"transformers.models.auto.{module}_auto:{name}")


def _register_configs(configuration_auto: ModuleType) -> None:
    for model_type in dict.fromkeys(name for classes in families() for name in classes.model_types):
        owners = [classes for classes in families() if model_type in classes.model_types]
        own_class = configuration_auto.CONFIG_MAPPING_NAMES.get(model_type)
        dispatcher = _Dispatcher(model_type, owners, own_class)
        configuration_auto.AutoConfig.register(model_type, dispatcher, exist_ok=True)


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
