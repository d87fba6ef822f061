#!/bin/sh
# LoRA on the language model.
mmtool sft \
    --model_type tiny ${MODEL:+--model_id_or_path "$MODEL"} \
    ${DATASET:+--dataset "$DATASET"} \
    --sft_type lora --learning_rate 1e-4 \
    --num_train_epochs 1 --save_steps 100 \
    "$@"
