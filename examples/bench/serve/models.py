"""Random models to measure servers with: a Llama of 56 million parameters, and a small LLaVA of 24 million.

Weights are random, so answers mean nothing, but every server has the same work to do with them. The folders are in
transformers' own formats: mmtool, ``transformers serve`` and vLLM all load them. No special token is ever the likeliest
one, so that a greedy answer is as long as asked for.

    python examples/bench/serve/models.py FOLDER [--dtype float32|bfloat16]      writes FOLDER/text and FOLDER/picture
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 8000
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>")
IMAGE_SIZE, PATCH_SIZE = 224, 14  # 256 image tokens
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image> {% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}</s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def word(index: int) -> str:
    """Return the text of one token, which has a space in front."""
    return f"w{index % (VOCABULARY - len(SPECIAL))}"


def make_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words are whole tokens, so that a prompt of n words has n tokens."""
    words = {f"w{index}": index + len(SPECIAL) for index in range(size - len(SPECIAL))}
    vocabulary = {token: index for index, token in enumerate(SPECIAL)} | words
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<image>", "<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def text_config(hidden_size: int, layers: int, intermediate_size: int, kv_heads: int) -> LlamaConfig:
    """Return a Llama with heads of 64, which is the smallest size that every server takes."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def make_text_model() -> LlamaForCausalLM:
    """Return a Llama of 56 million parameters."""
    torch.manual_seed(0)
    return _finished(LlamaForCausalLM(text_config(640, layers=10, intermediate_size=1728, kv_heads=5)))


def make_picture_model() -> LlavaForConditionalGeneration:
    """Return a LLaVA of 24 million parameters: pictures of 224 pixels become 256 tokens."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=256,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(384, layers=8, intermediate_size=1024, kv_heads=6),
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return _finished(LlavaForConditionalGeneration(config))


def _finished(model: PreTrainedModel) -> PreTrainedModel:
    """Spread the weights enough that answers vary, and keep special tokens out of them."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1.5 * weight[0].numel() ** -0.5 if "embed" not in name else 0.5)
        model.get_output_embeddings().weight[: len(SPECIAL)] = 0
    model.generation_config.do_sample = False
    return model.eval()


def save_text_model(folder: Path, dtype: torch.dtype) -> Path:
    """Write the Llama to ``folder``."""
    make_text_model().to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_picture_model(folder: Path, dtype: torch.dtype) -> Path:
    """Write the LLaVA to ``folder``."""
    make_picture_model().to(dtype).save_pretrained(folder)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE),
        make_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    return folder


def main() -> None:
    """Write both folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    for name, save in (("text", save_text_model), ("picture", save_picture_model)):
        print(save(args.folder / name, dtype))


if __name__ == "__main__":
    main()
