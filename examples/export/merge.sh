#!/bin/sh
# Fold an adapter into its base: a folder like the released one.
mmtool export --ckpt_dir "${CKPT:?is a checkpoint of mmtool sft}" --merge_lora true "$@"
