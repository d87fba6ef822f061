#!/bin/sh
# LoRA on the language model.
mmtool sft \
    --model_type "${MODEL_TYPE:-fm9g-4b-chat}" ${MODEL:+--model_id_or_path "$MODEL"} \
    --dataset "${DATASET:?is a file of rows, see docs/datasets.md}" \
    --sft_type lora --learning_rate 1e-4 \
    --num_train_epochs 1 --save_steps 100 \
    "$@"
