#!/bin/sh
# One file for llama.cpp, of a language model.
mmtool export --model_id_or_path "${MODEL:?is a model folder}" --to_gguf true --gguf_type f16 "$@"
