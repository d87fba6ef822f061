"""Load a model and its processor as transformers' Auto tables say for its ``config.json``; no code of it runs."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, AutoConfig
from transformers.models.auto.feature_extraction_auto import AutoFeatureExtractor
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging
from transformers.utils.import_utils import is_torchvision_available

from mmtool.errors import CheckpointError, MMToolError
from mmtool.models.common.folders import read_json
from mmtool.models.common.quantised import CONFIG_KEY
from mmtool.models.common.text_processor import TextProcessor
from mmtool.models.common.weights import read_weights
from mmtool.spec import Modality, ModelSpec
from mmtool.utils import import_object

# The Auto tables to look in, the first that has the model wins; the second is for versions without the first.
_MEDIA_TABLES = ("MODEL_FOR_MULTIMODAL_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING")
_TEXT_TABLE = "MODEL_FOR_CAUSAL_LM_MAPPING"
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_ATTENTION_FLAGS = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}
_NAMED_KEYS = 3


class AutoNative:
    """Stands for the head class that a folder's ``config.json`` asks for."""

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **keywords: Any) -> Any:
        """Load the model of a folder; keywords as for transformers' ``from_pretrained``.

        Raises:
            CheckpointError: when transformers does not know the model, or weights are missing or of another shape.
        """
        config = read_config(Path(folder))
        model_class, _ = head_class(config, folder)
        keywords.pop("trust_remote_code", None)
        asked = keywords.get("attn_implementation")
        if asked in _ATTENTION_FLAGS and not getattr(model_class, _ATTENTION_FLAGS[asked]):
            raise MMToolError(
                f"--attn_impl {asked}: {model_class.__name__} does not have it", "Use eager, or leave --attn_impl out."
            )
        source: str | os.PathLike | None = folder
        if getattr(config, CONFIG_KEY, None) is not None:
            source, keywords = None, _quantised(Path(folder), config, keywords)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # its report of missing weights; ours is the error below
        try:
            model, report = model_class.from_pretrained(
                source, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **keywords
            )
        except OSError as error:  # no file with weights
            raise CheckpointError(f"{folder}: {str(error).splitlines()[0]}", "Download the weights again.") from error
        finally:
            logging.set_verbosity(verbosity)
        _check_report(report, folder)
        return model


def _quantised(folder: Path, config: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords that load weights of ``mmtool export --quant_method torchao``, of whose files transformers
    knows nothing.
    """
    dtype = keywords.get("dtype")
    if dtype in (None, "auto"):
        dtype = config.dtype or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    weights = {name: tensor.astype(dtype) for name, tensor in read_weights(folder).items()}
    config.name_or_path = str(folder)
    more: dict[str, Any] = {"state_dict": weights, "dtype": dtype}
    if (folder / "generation_config.json").is_file():
        more["generation_config"] = transformers.GenerationConfig.from_pretrained(folder)
    return keywords | more


def _check_report(report: Mapping[str, Any], folder: str | os.PathLike) -> None:
    """Refuse a model some of whose weights are random; weights that it does not need are nobody's harm."""
    problems = []
    for word, key in (("missing", "missing_keys"), ("of another shape", "mismatched_keys")):
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in report.get(key) or ())
        if names:
            more = f" and {len(names) - _NAMED_KEYS} more" if len(names) > _NAMED_KEYS else ""
            problems.append(f"{word}: {', '.join(names[:_NAMED_KEYS])}{more}")
    if problems:
        raise CheckpointError(
            f"the weights in {folder} do not fit its config.json ({'; '.join(problems)})", "Download the folder again."
        )


class AutoNativeProcessor:
    """Stands for the processor of a folder: transformers' own class, or a ``TextProcessor`` where text is all."""

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, *, tokenizer: Any = None, **settings: Any) -> Any:
        """Return the processor of a folder; ``tokenizer`` is read from it if None, ``settings`` win over the folder's.

        Pictures are prepared by the PIL variants of transformers' image processors, so that results depend neither on
        torchvision being installed nor on its version. A part for videos is left out: nothing here feeds it.
        """
        folder = Path(folder)
        config = read_config(folder)
        if tokenizer is None:
            tokenizer = _read_part(AutoTokenizer, folder)
        tokenizer.generation_stop_ids = _stop_ids(folder)  # only the folder knows them, and templates see no folder
        _, modalities = head_class(config, folder)
        processor_class = _processor_class(folder, config) if modalities else None
        if processor_class is None:
            return TextProcessor(tokenizer)
        try:
            loading, loaded = _without_video(processor_class, tokenizer)
            processor = loading.from_pretrained(folder, **settings)
        except ImportError as error:  # SmolVLM's wants num2words, and says so
            reason = str(error).splitlines()[0]
            hint = "pip install 'mmtool[smolvlm]'" if "num2words" in reason else None
            raise MMToolError(f"{processor_class.__name__}: {reason}", hint) from error
        processor.__class__ = loaded
        return processor


def read_config(folder: Path) -> Any:
    """Return the configuration of a folder.

    Raises:
        CheckpointError: when transformers does not know the model, also where the folder brings code for it.
    """
    settings = read_json(folder / "config.json")
    model_type = settings.get("model_type")
    if model_type not in CONFIG_MAPPING_NAMES:
        code = ", and the code in the folder (auto_map) is never run" if settings.get("auto_map") else ""
        raise CheckpointError(
            f"{folder} holds a {model_type!r} model, which neither mmtool nor transformers {transformers.__version__} "
            f"knows{code}",
            "`mmtool list models` shows what mmtool knows; a newer transformers may know more.",
        )
    if "mm_vision_tower" in settings and "text_config" not in settings:
        raise CheckpointError(
            f"{folder} is in the layout of LLaVA's own code, which transformers does not read",
            "Take the model as converted for transformers; its name often ends in -hf.",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about the field names of older releases, nobody's fault
        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (StrictDataclassError, TypeError, AttributeError, KeyError, ValueError) as error:
            said = str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"{folder}/config.json is no config of a {model_type!r} model: {said}",
                "Compare it with the release's file.",
            ) from error


def head_class(config: Any, folder: str | os.PathLike) -> tuple[Any, tuple[Modality, ...]]:
    """Return the class with a language model head for ``config``, and what it understands beside text.

    Raises:
        CheckpointError: for a model that does not continue text.
    """
    if config.is_encoder_decoder:
        raise CheckpointError(
            f"{folder} holds a {config.model_type} model, an encoder with a decoder: only models that continue their "
            "prompt can be used"
        )
    for table in (*_MEDIA_TABLES, _TEXT_TABLE):
        mapping = getattr(modeling_auto, table, {})  # older versions lack the first
        if type(config) in mapping:
            model_class = mapping[type(config)]
            takes = model_class.input_modalities if table != _TEXT_TABLE else ()
            return model_class, tuple(kind for kind in ("image", "audio") if kind in takes)
    raise CheckpointError(f"{folder} holds a {config.model_type} model, which does not answer in text")


def refine_spec(spec: ModelSpec, folder: Path) -> ModelSpec:
    """Return ``spec`` with what the model in ``folder`` understands."""
    _, modalities = head_class(read_config(folder), folder)
    return dataclasses.replace(spec, modalities=modalities, media_style="inline" if modalities else "none")


def _stop_ids(folder: Path) -> tuple[int, ...]:
    """Return the ids that end an answer according to ``generation_config.json``."""
    path = folder / "generation_config.json"
    ids = read_json(path).get("eos_token_id") if path.is_file() else None
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def _processor_class(folder: Path, config: Any) -> Any | None:
    for name in _PROCESSOR_FILES:
        named = read_json(folder / name).get("processor_class") if (folder / name).is_file() else None
        if isinstance(named, str) and hasattr(transformers, named):
            return import_object(f"transformers:{named}")
    return PROCESSOR_MAPPING.get(type(config), None)


def _without_video(processor_class: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Return two subclasses whose parts are ``tokenizer``, a PIL image processor and a feature extractor.

    The parts for videos need torchvision, which nothing else here does; without it the class could not be made. The
    first subclass is for loading, which counts all parts of the constructor; the second, whose object it then is, knows
    of no others than are there.
    """
    names = processor_class.get_attributes()

    def read_parts(cls: Any, folder: Path, processor_dict: Any = None, **keywords: Any) -> list[Any]:
        parts = {"tokenizer": lambda: tokenizer, "image_processor": lambda: _read_images(folder)}
        parts["feature_extractor"] = lambda: _read_part(AutoFeatureExtractor, folder)
        own = [name for name in names if name not in parts and not name.startswith("video")]
        if own:
            raise MMToolError(f"{processor_class.__name__} has parts that mmtool does not know: {', '.join(own)}")
        return [parts[name]() if name in parts else None for name in names]

    def check(self: Any, name: str, part: Any) -> Any:
        return None if part is None else processor_class.check_argument_for_proper_class(self, name, part)

    body = {
        "__module__": processor_class.__module__,
        "__doc__": processor_class.__doc__,
        "_get_arguments_from_pretrained": classmethod(read_parts),
        "check_argument_for_proper_class": check,
        "get_attributes": classmethod(lambda cls: names),
    }
    # Under the same name, because save_pretrained writes it.
    loading = type(processor_class.__name__, (processor_class,), body)
    present = [name for name in names if not name.startswith("video")]
    body["get_attributes"] = classmethod(lambda cls: present)
    # Where a class has a method of its own for that, it is about videos, and SmolVLM's asks the part for them.
    if len(present) < len(names):
        body["apply_chat_template"] = ProcessorMixin.apply_chat_template
    return loading, type(processor_class.__name__, (loading,), body)


def _read_images(folder: Path) -> Any:
    try:
        return _read_part(AutoImageProcessor, folder, backend="pil")
    except (ImportError, ValueError) as error:  # a few exist for torchvision only
        if is_torchvision_available():
            return _read_part(AutoImageProcessor, folder)
        raise MMToolError(
            f"the image processor of {folder} exists for torchvision only: {str(error).splitlines()[0]}",
            "Install it: pip install torchvision",
        ) from error


def _read_part(auto_class: Any, folder: Path, **keywords: Any) -> Any:
    try:
        return auto_class.from_pretrained(folder, trust_remote_code=False, **keywords)
    except OSError as error:  # missing files, in a message of several lines
        raise CheckpointError(f"{folder}: {str(error).splitlines()[0]}", "Download the missing file.") from error
