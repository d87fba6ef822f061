#!/bin/sh
# LoRA on every linear layer of the language model, weights shared out by DeepSpeed ZeRO-3.
mmtool sft \
    --model_type megrez-3b-instruct ${MODEL:+--model_id_or_path "$MODEL"} \
    --dataset "${DATASET:?is a file of rows, see docs/datasets.md}" \
    --sft_type lora --lora_target_modules ALL --deepspeed default-zero3 \
    --num_train_epochs 1 --save_steps 100 \
    "$@"
