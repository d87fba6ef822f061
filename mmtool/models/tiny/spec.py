"""The embedded model type, as data; the network and the processor are Yi-VL's."""

from __future__ import annotations

from mmtool.models.common.layout import LLM_QKV, PARTS
from mmtool.spec import ModelSpec

SPECS = (
    ModelSpec(
        model_type="tiny",
        family="tiny",
        hf_id=None,
        ms_id=None,
        modalities=("image",),
        media_style="round",
        template_type="tiny",
        model_class="mmtool.models.yi_vl.modeling_yi_vl:YiVLForConditionalGeneration",
        processor_class="mmtool.models.yi_vl.processing_yi_vl:YiVLProcessor",
        template_class="mmtool.models.tiny.template:TinyTemplate",
        matches=lambda config: config.get("mmtool_model_type") == "tiny",
        parts=PARTS,
        lora_target_modules=LLM_QKV,
        embedded="checkpoint",
        description="a few million parameters, in the package: English and Chinese, drawn pictures",
    ),
)
