"""What vLLM calls in each of its processes, through the entry point ``vllm.general_plugins``; without remote code.

It lets transformers' Auto classes find our configurations, networks, processors and tokenizers, and tells vLLM which
class runs the architectures that our folders name. Nothing of torch or vLLM's engine is imported here.
"""

from __future__ import annotations

from mmtool import auto

TEXT_CLASS = "mmtool.engine.vllm_models:MMToolForCausalLM"
MEDIA_CLASS = "mmtool.engine.vllm_models:MMToolForConditionalGeneration"


def register() -> None:
    """Register everything; may be called again."""
    from vllm import ModelRegistry

    auto.install()
    # Under their own names, the classes are for folders that VllmEngine opens.
    classes = {path.partition(":")[2]: path for path in (TEXT_CLASS, MEDIA_CLASS)}
    for architecture, path in (classes | architectures()).items():
        ModelRegistry.register_model(architecture, path)


def architectures() -> dict[str, str]:
    """Return for each architecture of ours the import path of the class that runs it in vLLM."""
    found = {}
    for classes in auto.families():
        path = TEXT_CLASS if classes.image_processor_class is None else MEDIA_CLASS
        own_name = classes.model_class.partition(":")[2]
        found |= dict.fromkeys((own_name, *classes.architectures), path)
    return found
