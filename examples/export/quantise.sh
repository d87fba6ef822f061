#!/bin/sh
# Merge, and round the language model to 4 bits; towers and projectors stay as they are.
mmtool export \
    --ckpt_dir "${CKPT:?is a checkpoint of mmtool sft}" --merge_lora true \
    --quant_method torchao --quant_bits 4 \
    "$@"
