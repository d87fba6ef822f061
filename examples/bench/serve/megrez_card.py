"""The workload of Megrez-3B-Omni's model card, exactly: how long the pt engine takes for 100 requests, 8 at a time.

Each request has 128 text tokens and a picture of 720 x 1480 (7 slices, 448 positions; 624 positions in all), and gets
128 new tokens, greedily with a repetition penalty of 1.2; nothing ends an answer early. The card's figure for one H100
with vLLM is 9.885 s in all, 1294.9 output tokens/s. Weights are random at the released size in bfloat16: the time does
not depend on them. Pictures are cut up beforehand, as on the card; the vision tower is inside the time. Here all
pictures and texts differ and prompts are not reused, so nothing is computed less often than 100 times.

    python examples/bench/serve/megrez_card.py                                 on a GPU
    python examples/bench/serve/megrez_card.py --tiny --requests 4             a small model, anywhere

The first run includes what a server does once: choosing kernels, recording CUDA graphs.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch
from models import make_tokenizer
from PIL import Image

from mmtool.engine.base import Request, Sampling
from mmtool.engine.pt import PtEngine
from mmtool.models.megrez.configuration_megrez import MegrezOmniConfig
from mmtool.models.megrez.modeling_megrez import MegrezOmniForConditionalGeneration
from mmtool.models.megrez.processing_megrez import MegrezOImageProcessor
from mmtool.template.base import MediaInput

CARD_SECONDS, CARD_TOKENS_PER_SECOND = 9.885, 1294.9
PICTURE_SIZE = (720, 1480)
PROMPT_LENGTH, TEXT_BEFORE_PICTURE = 624, 28  # the rest of the 160 other positions stands behind it
RELEASED = {
    "hidden_size": 2560, "intermediate_size": 7168, "num_hidden_layers": 32, "num_attention_heads": 40,
    "num_key_value_heads": 10, "vocab_size": 122880, "rope_theta": 5_000_000.0, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": 120005, "tie_word_embeddings": False,
    "vision_config": {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 980, "patch_size": 14,
    },
    "audio_config": {},
}  # fmt: skip
SMALL = RELEASED | {
    "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1000, "eos_token_id": 5,
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 980, "patch_size": 14,
    },
    "audio_config": {"n_state": 32, "n_head": 2, "n_layer": 1, "output_dim": 128},
    "special_token_ids": {
        name: 10 + index
        for index, name in enumerate(
            ("feature", "image_start", "image_end", "slice_start", "slice_end", "audio_start", "audio_end", "image",
             "audio", "end_of_text")
        )
    },
}  # fmt: skip


def make_model(tiny: bool, device: str, dtype: torch.dtype) -> MegrezOmniForConditionalGeneration:
    """Return a model with random weights on its device."""
    config = MegrezOmniConfig.from_dict(dict(SMALL if tiny else RELEASED))
    torch.manual_seed(0)
    with torch.device(device):
        model = MegrezOmniForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval().requires_grad_(False)


def picture_ids(config: MegrezOmniConfig, grid: tuple[int, int]) -> list[int]:
    """Return the ids of a picture in a prompt: an overview, and lines of tiles between new lines."""
    ids = config.special_token_ids
    feature = [ids["feature"]] * config.query_num
    tile = [ids["slice_start"], *feature, ids["slice_end"]]
    columns, rows = grid
    lines = [*tile * columns, *([1] + tile * columns) * (rows - 1)]
    return [ids["image_start"], *feature, ids["image_end"], *lines]


def make_requests(config: MegrezOmniConfig, count: int, new_tokens: int) -> list[Request]:
    """Return the requests, pictures cut up."""
    processor, rng = MegrezOImageProcessor(), random.Random(0)
    requests = []
    for number in range(count):
        noise = Image.frombytes("RGB", (36, 74), rng.randbytes(36 * 74 * 3)).resize(PICTURE_SIZE)
        ids = picture_ids(config, processor.plan(PICTURE_SIZE).grid)
        made = processor(images=[noise], return_tensors="pt")
        inputs = {name: made[name] for name in processor.model_input_names}
        index = tuple(place for place, token in enumerate(ids) if token == config.special_token_ids["feature"])
        item = MediaInput("image", TEXT_BEFORE_PICTURE, len(ids), inputs, f"{number:032x}", tuple(ids), index)
        text = [rng.randrange(30, config.text_config.vocab_size // 2) for _ in range(PROMPT_LENGTH - len(ids))]
        prompt = [*text[:TEXT_BEFORE_PICTURE], *ids, *text[TEXT_BEFORE_PICTURE:]]
        sampling = Sampling(max_new_tokens=new_tokens, repetition_penalty=1.2, ignore_eos=True)
        requests.append(Request(input_ids=prompt, media=[item], sampling=sampling))
    return requests


def run(engine: PtEngine, requests: list[Request]) -> tuple[float, int, float]:
    """Answer all requests; return seconds, output tokens, and the median time to a first token in seconds."""
    engine.clear(features=True)
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    start, tokens, first = time.perf_counter(), 0, []
    for delta in engine.generate(requests):
        tokens += len(delta.token_ids)
        if delta.usage is not None:
            first.append(delta.usage.time_to_first_token)
    return time.perf_counter() - start, tokens, statistics.median(first)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="A model of less than a million parameters.")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--at_once", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prefill_chunk", type=int, default=2048)
    parser.add_argument("--compile", choices=("true", "false"), help="CUDA graphs; by default on a GPU.")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(args.tiny, device, torch.bfloat16)
    requests = make_requests(model.config, args.requests, args.new_tokens)
    engine = PtEngine(
        model,
        make_tokenizer(model.config.text_config.vocab_size),
        max_batch_size=args.at_once,
        max_model_len=PROMPT_LENGTH + args.new_tokens + 8,
        prefill_chunk=args.prefill_chunk,
        reuse_prefix=False,
        preallocate=True,
        compile=None if args.compile is None else args.compile == "true",
    )
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    size = sum(weight.numel() for weight in model.parameters()) / 1e9
    print(f"{name}, {size:.2f} billion parameters, {args.requests} requests, {args.at_once} at a time\n")
    print("| run | seconds | output tokens/s | input tokens/s | median s to first token | card's seconds / these |")
    print("|---|---|---|---|---|---|")
    for number in range(args.repeats):
        seconds, tokens, first = run(engine, requests)
        assert tokens == args.requests * args.new_tokens, "answers are as long as asked for"
        share = f"{CARD_SECONDS / seconds:.2f} x" if args.requests == 100 and not args.tiny else "-"
        inputs = args.requests * PROMPT_LENGTH / seconds
        print(f"| {number + 1} | {seconds:.3f} | {tokens / seconds:.1f} | {inputs:.1f} | {first:.3f} | {share} |")
    print(f"| card, H100, vLLM | {CARD_SECONDS} | {CARD_TOKENS_PER_SECOND} | 6312.7 | | 1.00 x |")


if __name__ == "__main__":
    main()
