#!/bin/sh
# One model of two adapters, the first counting more.
mmtool export \
    --adapters "${CKPT:?is a checkpoint of mmtool sft}:0.7" "${OTHER_CKPT:?is another one of the same model}:0.3" \
    --merge_lora true "$@"
