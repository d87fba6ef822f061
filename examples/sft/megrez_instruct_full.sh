#!/bin/sh
# The whole model; several GPUs for the large ones (NPROC_PER_NODE=8).
mmtool sft \
    --model_type megrez-3b-instruct ${MODEL:+--model_id_or_path "$MODEL"} \
    --dataset "${DATASET:?is a file of rows, see docs/datasets.md}" \
    --sft_type full --learning_rate 1e-5 \
    --num_train_epochs 1 --save_steps 100 \
    "$@"
