#!/bin/sh
# Merge and publish, with a model card. The token: HF_TOKEN, or what `hf auth login` has stored.
mmtool export \
    --ckpt_dir "${CKPT:?is a checkpoint of mmtool sft}" --merge_lora true \
    --push_to_hub true --hub_model_id "${REPOSITORY:?is owner/name}" \
    "$@"
