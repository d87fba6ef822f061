"""Make transformers' Auto classes know our models, without importing transformers before the user does.

Only the public ``register`` calls of transformers are used. ``AutoConfig`` learns the names of our families as soon as
its module is loaded, which a module finder in ``sys.meta_path`` waits for, and so do ``AutoProcessor`` and
``AutoImageProcessor``, which look for a class by the name in a folder's files; the rest follows when a config of ours
is first read. What is registered stands in the ``auto`` field of each ``ModelSpec``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from mmtool.registry import MODELS
from mmtool.spec import AutoClasses
from mmtool.utils import import_object

_AUTO = "transformers.models.auto."


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


class _StandIn(type):
    """A class that is found by its name and is, for all that is asked of it, the one at an import path."""

    def __new__(cls, path: str) -> _StandIn:
        return super().__new__(cls, path.rpartition(":")[2], (), {"__module__": path.partition(":")[0]})

    def __init__(cls, path: str) -> None:
        super().__init__(cls.__name__, (), {})
        cls.path = path

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return import_object(cls.path)(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        return getattr(import_object(cls.path), name)


@functools.cache
def _stand_in(path: str) -> _StandIn:
    """Return the one class that is found in the place of the one at an import path."""
    return _StandIn(path)


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
    # By its name alone, not for the configuration: only then is it taken even where somebody allows the folder's code.
    _auto("tokenization:AutoTokenizer").register(
        _stand_in(classes.config_class), import_object(classes.tokenizer_class), exist_ok=True
    )
    if classes.processor_class is not None:
        _auto("processing:AutoProcessor").register(config, import_object(classes.processor_class), exist_ok=True)
    if classes.image_processor_class is not None:
        _auto("image_processing:AutoImageProcessor").register(
            config, image_processor_classes={"pil": import_object(classes.image_processor_class)}, exist_ok=True
        )
    if classes.feature_extractor_class is not None:
        _auto("feature_extraction:AutoFeatureExtractor").register(
            config, import_object(classes.feature_extractor_class), exist_ok=True
        )
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


def _register_processors(processing_auto: ModuleType) -> None:
    for classes in families():
        if classes.processor_class is not None:
            key = _stand_in(classes.config_class)
            processing_auto.AutoProcessor.register(key, _stand_in(classes.processor_class), exist_ok=True)


def _register_image_processors(image_processing_auto: ModuleType) -> None:
    for classes in families():
        if classes.image_processor_class is not None:
            # Not through AutoImageProcessor.register: it asks for a real class, which would have to be loaded for that.
            image_processing_auto.IMAGE_PROCESSOR_MAPPING.register(
                _stand_in(classes.config_class), {"pil": _stand_in(classes.image_processor_class)}, exist_ok=True
            )


_REGISTER = {
    f"{_AUTO}configuration_auto": _register_configs,
    f"{_AUTO}processing_auto": _register_processors,
    f"{_AUTO}image_processing_auto": _register_image_processors,
}


class _RegisteringLoader:
    """Load a module with its own loader, then register our classes in it."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the module's own loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, looking as if its own loader had done so alone."""
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _REGISTER[module.__name__](module)


class _AutoFinder:
    """Find the modules of the Auto classes; leave all others to the finders behind."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the module's spec with our loader round its own."""
        spec = PathFinder.find_spec(name, path, target) if name in _REGISTER else None
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def install() -> None:
    """Register with what is loaded now, and with the rest when it will be; may be called again."""
    for name, register in _REGISTER.items():
        if name in sys.modules:
            register(sys.modules[name])
    if not any(isinstance(finder, _AutoFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoFinder())
