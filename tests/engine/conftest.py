"""A small Yi-VL with random weights, requests for it, and what transformers' ``generate`` answers to them."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch

from mmtool.engine.base import Request, Sampling
from mmtool.engine.pt import PtEngine
from mmtool.models.common.tokenization import SentencePieceTokenizer
from mmtool.models.yi_vl.configuration_yi_vl import YiVLConfig
from mmtool.models.yi_vl.modeling_yi_vl import YiVLForConditionalGeneration
from mmtool.template.base import MediaInput


@pytest.fixture(scope="session")
def tokenizer(golden: Callable) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.from_pretrained(golden("yi-vl") / "checkpoint")


@pytest.fixture(scope="session")
def small(tokenizer: SentencePieceTokenizer) -> "Small":
    return Small(tokenizer)


class Small:
    """A model of 16 positions per picture and 512 in all, and short ways to use it."""

    image_token, image_length, vocabulary, max_model_len = 9, 16, 1088, 512

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self.tokenizer = tokenizer
        self.model = self.network()

    def network(self, attention: str = "sdpa") -> YiVLForConditionalGeneration:
        """Weights much larger than a fresh model's, so that every token depends clearly on all before it."""
        text = {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": self.vocabulary, "max_position_embeddings": self.max_model_len,
            "eos_token_id": None,
        }  # fmt: skip
        vision = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 56, "patch_size": 14,
        }  # fmt: skip
        config = YiVLConfig(text_config=text, vision_config=vision, image_token_id=self.image_token)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(5)
            model = YiVLForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(0, 2 * weight[0].numel() ** -0.5)
        return model.requires_grad_(False)

    def engine(self, model: Any = None, **options: Any) -> PtEngine:
        return PtEngine(self.model if model is None else model, self.tokenizer, **options)

    def ids(self, seed: int, length: int) -> list[int]:
        return torch.randint(150, self.vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()

    def picture(self, seed: int) -> MediaInput:
        pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(seed))
        key = hashlib.blake2b(bytes([seed]), digest_size=16).hexdigest()
        return MediaInput("image", 0, self.image_length, {"pixel_values": pixels}, key)

    def request(self, *parts: Sequence[int] | MediaInput, max_new_tokens: int = 8, **fields: Any) -> Request:
        """A prompt of ids and pictures, in that order."""
        input_ids, media = [], []
        for part in parts:
            if isinstance(part, MediaInput):
                media.append(dataclasses.replace(part, start=len(input_ids)))
                part = [self.image_token] * part.length
            input_ids += part
        fields.setdefault("sampling", Sampling(max_new_tokens=max_new_tokens))
        return Request(input_ids=input_ids, media=media, **fields)

    def generated(self, request: Request, model: Any = None) -> tuple[int, ...]:
        """What ``generate`` answers to one request, greedily."""
        ids = torch.tensor([request.input_ids])
        media = [item.inputs["pixel_values"] for item in request.media]
        length = request.sampling.max_new_tokens
        out = (model or self.model).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            max_new_tokens=length, **({"pixel_values": torch.cat(media)} if media else {}),
        )  # fmt: skip
        return tuple(out[0, ids.shape[1] :].tolist())

    def answers(self, engine: PtEngine, requests: Iterable[Request], **options: Any) -> list[tuple[int, ...]]:
        """The ids of all answers, in the order of the requests."""
        ids: dict[int, tuple[int, ...]] = {}
        for delta in engine.generate(requests, **options):
            ids[delta.index] = ids.get(delta.index, ()) + delta.token_ids
        return [ids[index] for index in sorted(ids)]
