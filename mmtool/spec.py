"""What the registry knows about a model, as data; classes are named by import path and load on first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Modality = Literal["image", "audio"]


@dataclass(frozen=True, kw_only=True)
class AutoClasses:
    """What transformers' Auto classes learn of a family; classes are import paths ``package.module:Name``.

    Attributes:
        model_types: values of ``model_type`` in a ``config.json`` under which the family's folders are found, each with
            what tells from the file's content whether it is ours: the name may be one that transformers uses itself.
        config_class: the configuration.
        base_model_class: the network without a head, for ``AutoModel``.
        model_class: the network with its head, for the Auto classes named in ``heads``.
        heads: ``AutoModelForImageTextToText``, ``AutoModelForCausalLM``, ...
        tokenizer_class: for ``AutoTokenizer``.
        processor_class: for ``AutoProcessor``; ``image_processor_class`` and ``feature_extractor_class`` for theirs,
            None where the family has no such thing.
        architectures: what ``architectures`` in a ``config.json`` of the family may name, for vLLM's own server; beside
            the name of ``model_class``.
    """

    model_types: Mapping[str, Callable[[Mapping[str, Any]], bool]]
    config_class: str
    base_model_class: str
    model_class: str
    heads: tuple[str, ...]
    tokenizer_class: str
    processor_class: str | None = None
    image_processor_class: str | None = None
    feature_extractor_class: str | None = None
    architectures: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model type.

    Attributes:
        model_type: the user's word, ``yi-vl-6b-chat``.
        family: the folder below ``mmtool/models``.
        hf_id: id on the Hugging Face hub, if it is there; ``ms_id`` the same for ModelScope.
        modalities: what it understands beside text.
        media_style: ``round``: the chat asks for one medium per turn; ``inline``: ``<img>..</img>`` in the text;
            ``none``: text only.
        template_type: name of its chat format.
        model_class: import path ``package.module:Name``; so are ``processor_class`` and ``template_class``.
        matches: tells from the content of a ``config.json`` whether a folder is of this type; the first match in
            registry order wins.
        parts: module name prefixes by part (``llm``, ``vision_encoder``, ``vision_proj``), to freeze or to target.
        lora_target_modules: regular expression on module names, the default LoRA targets.
        refine: import path of a function ``(spec, folder) -> spec``, for a type whose folders differ in what they can;
            None for the others.
        layout: import path of a function ``model -> (parts, lora_target_modules)``, for a type whose models differ in
            their modules; None for the others.
        gguf: import path of a function ``config -> GGUFLayout``, for language models that llama.cpp runs.
        auto: what transformers' Auto classes learn; types that share classes share the object, None adds nothing.
        embedded: folder with the weights inside the family's package folder, for a model that needs no download.
        description: one line for the model list.
        docs: page below ``docs/`` about it.
    """

    model_type: str
    family: str
    hf_id: str | None
    ms_id: str | None
    modalities: tuple[Modality, ...]
    media_style: Literal["round", "inline", "none"] = "round"
    template_type: str
    model_class: str
    processor_class: str
    template_class: str
    matches: Callable[[Mapping[str, Any]], bool] = field(repr=False)
    parts: Mapping[str, tuple[str, ...]] = field(repr=False)
    lora_target_modules: str = field(repr=False)
    refine: str | None = field(default=None, repr=False)
    layout: str | None = field(default=None, repr=False)
    gguf: str | None = field(default=None, repr=False)
    auto: AutoClasses | None = field(default=None, repr=False)
    embedded: str | None = None
    description: str = ""
    docs: str = ""
