#!/bin/sh
# Turn .bin weights into safetensors once, so that later loads are mapped.
mmtool export --model_id_or_path "${MODEL:?is a model folder}" --to_safetensors true "$@"
