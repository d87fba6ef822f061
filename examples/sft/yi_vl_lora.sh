#!/bin/sh
# LoRA on the language model.
mmtool sft \
    --model_type yi-vl-6b-chat ${MODEL:+--model_id_or_path "$MODEL"} \
    --dataset "${DATASET:-coco-en-2-mini}" \
    --sft_type lora --learning_rate 1e-4 \
    --num_train_epochs 1 --save_steps 100 \
    "$@"
