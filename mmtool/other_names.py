"""What scripts for ms-swift write and mmtool spells in another way: a hint for every option and command of that kind.

Options that mean the same are aliases where they are declared; here is what needs a sentence.
"""

_TEMPLATE = "Leave it out: the template goes with the model; --template_kwargs has its settings."
_CHECKPOINT = "Leave it out: the checkpoint of --ckpt_dir knows it."
_BNB = "Leave it out: bitsandbytes holds weights as nf4 with double quantisation; --quantization_bit 4 is enough."
_ONE_TUNER = "Leave it out: adapters are peft's (LoRA, DoRA, rsLoRA)."
_METHODS = "mmtool trains adapters (--sft_type lora, --use_dora, --use_rslora) or the weights (--sft_type full)."
_TRAINING_ARG = "Give it as --training_args {name}=VALUE."
_SELF_COGNITION = "Write the rows yourself and name their file with --dataset."
_MIX = "Name all sets with --dataset, each with its number of rows: a#500 b#200."
_VLLM = "Give it in --vllm_args, by the name it has in vLLM."
_EVALUATE = (
    "Evaluation while training is by loss; mmtool infer --ckpt_dir FOLDER --load_dataset_config true answers the rows."
)

OPTIONS = {
    "acc_strategy": "Leave it out: the loss is logged, no accuracy.",
    "aligner_lr": "There is one learning rate for all parts: --learning_rate.",
    "bnb_4bit_comp_dtype": _BNB,
    "bnb_4bit_quant_storage": _BNB,
    "bnb_4bit_quant_type": _BNB,
    "bnb_4bit_use_double_quant": _BNB,
    "check_dataset_strategy": "Use --check_dataset strict, warn or off.",
    "check_model_is_latest": "Leave it out: nothing is looked up on a network.",
    "commit_message": "Leave it out.",
    "custom_register_path": "Python files are not loaded; --custom_dataset_info FILE names more datasets.",
    "dataset_seed": "Give it to mmtool sft; here rows are taken from the start.",
    "dataset_test_ratio": "Give it to mmtool sft; here every row is answered, or --val_dataset_sample of them.",
    "ddp_backend": "Leave it out: nccl on GPUs, gloo without.",
    "device_map_config_path": "Use --device_map, which takes JSON.",
    "disable_tqdm": "Leave it out: a bar is only drawn on a terminal.",
    "eval_human": "Leave it out: without --query and --val_dataset it is a chat.",
    "evaluation_strategy": "Give it as --training_args eval_strategy=VALUE.",
    "freeze_aligner": "Use --tune_vision_proj true or false.",
    "freeze_llm": "Use --tune_llm true or false.",
    "fsdp_config": _TRAINING_ARG,
    "gpu_memory_fraction": "Leave it out; with --infer_backend vllm there is --gpu_memory_utilization.",
    "ignore_args_error": "Leave it out.",
    "include_num_input_tokens_seen": _TRAINING_ARG,
    "lazy_tokenize": "Leave it out: rows are always encoded while the model trains.",
    "limit_mm_per_prompt": _VLLM,
    "load_args": _CHECKPOINT,
    "load_args_from_ckpt_dir": _CHECKPOINT,
    "local_repo_path": "Leave it out: the models are part of mmtool, no repository is needed.",
    "logging_dir": "Leave it out: TensorBoard logs are in runs/ of the run's folder.",
    "lora_bias_trainable": "Name biases with --additional_trainable_parameters.",
    "lora_dtype": "Leave it out: what trains is held in float32.",
    "lora_lr_ratio": "LoRA+ is not supported: --learning_rate is for both matrices.",
    "max_pixels": 'Use --processor_kwargs, as in {"max_pixels": 1000000}, where the processor has such a setting.',
    "merge_device_map": "Use --device_map.",
    "metric": "The result file has answers beside labels; compare them as suits the task.",
    "model_author": _SELF_COGNITION,
    "model_name": _SELF_COGNITION,
    "model_revision": "Download the revision and give its folder with --model_id_or_path.",
    "neftune_backend": "Leave it out; --neftune_noise_alpha is enough.",
    "optim": _TRAINING_ARG,
    "overwrite_generation_config": "Leave it out: generation options are not written anywhere.",
    "padding_free": "Use --packing true.",
    "predict_with_generate": _EVALUATE,
    "push_hub_strategy": "Upload when the run is done: mmtool export --push_to_hub true.",
    "quant_device_map": "Use --device_map.",
    "report_to": "Leave it out: TensorBoard logs are written (--tensorboard false turns them off).",
    "result_dir": "Use --result_path FILE.",
    "safe_serialization": "Leave it out: weights are written as safetensors.",
    "save_on_each_node": _TRAINING_ARG,
    "save_safetensors": "Leave it out: weights are written as safetensors.",
    "save_strategy": _TRAINING_ARG,
    "self_cognition_sample": _SELF_COGNITION,
    "sequence_parallel_size": "Not supported; --packing true and --gradient_checkpointing true save memory.",
    "template_type": _TEMPLATE,
    "share": "Leave it out: mmtool serve --host 0.0.0.0 listens at every address of this machine.",
    "test_oom_error": "Leave it out: on a GPU the longest rows are tried first.",
    "to_ollama": "Use --to_gguf true, which writes a file that Ollama reads.",
    "to_peft_format": "Leave it out: adapters are in peft's format.",
    "train_dataset_mix_ds": _MIX,
    "train_dataset_mix_ratio": _MIX,
    "tuner_backend": _ONE_TUNER,
    "use_flash_attn": "Use --attn_impl flash_attention_2.",
    "use_hf": "Use --hub hf, and --dataset_hub hf for datasets.",
    "use_logits_to_keep": "Leave it out: only positions with a label get logits.",
    "use_loss_scale": 'Not supported; "loss": false on a message keeps its answer from being learned.',
    "vit_lr": "There is one learning rate for all parts: --learning_rate.",
    "vllm_enable_lora": "Leave it out: an adapter in --ckpt_dir turns it on.",
    "vllm_max_lora_rank": "Leave it out: it is read from the adapter.",
    "write_batch_size": "Leave it out: every row is written as soon as it is answered.",
}
"""What to do instead, by the name of the option."""

METHODS = ("adalora_", "boft_", "galore_", "hqq_", "ia3_", "lisa_", "llamapro_", "use_galore", "vera_")
"""Beginnings of options that belong to ways of training which mmtool does not have."""

COMMANDS = {
    "app": "Use mmtool serve --web_ui true.",
    "app-ui": "Use mmtool serve --web_ui true.",
    "chat": "Use mmtool infer.",
    "deploy": "Use mmtool serve.",
    "eval": "mmtool infer --val_dataset FILE writes answers beside labels.",
    "merge-lora": "Use mmtool export --ckpt_dir FOLDER --merge_lora true.",
    "predict": "Use mmtool infer --val_dataset FILE.",
    "pt": "Use mmtool sft: rows that are plain text are learned as a whole.",
    "train": "Use mmtool sft.",
    "web-ui": "Use mmtool serve --web_ui true.",
}
"""What to do instead, by the name of the command."""


def hint_for_option(name: str) -> str | None:
    """Return what to do instead of the option ``name`` of ms-swift, None where it is none of those."""
    if name.startswith(METHODS):
        return _METHODS
    hint = OPTIONS.get(name)
    return hint.replace("{name}", name) if hint else None
