#!/bin/sh
# Language model and projector as a whole; several GPUs for the large ones (NPROC_PER_NODE=8).
mmtool sft \
    --model_type tiny ${MODEL:+--model_id_or_path "$MODEL"} \
    ${DATASET:+--dataset "$DATASET"} \
    --sft_type full --learning_rate 1e-5 \
    --num_train_epochs 1 --save_steps 100 \
    "$@"
