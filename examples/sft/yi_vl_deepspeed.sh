#!/bin/sh
# LoRA on every linear layer of the language model, weights shared out by DeepSpeed ZeRO-3.
mmtool sft \
    --model_type yi-vl-6b-chat ${MODEL:+--model_id_or_path "$MODEL"} \
    --dataset "${DATASET:-coco-en-2-mini}" \
    --sft_type lora --lora_target_modules ALL --deepspeed default-zero3 \
    --num_train_epochs 1 --save_steps 100 \
    "$@"
