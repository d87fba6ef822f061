"""How many tokens per second the pt engine makes by itself, without HTTP: a closed loop of 1, 4 and 16 askers.

    python examples/bench/serve/engine.py FOLDER [--concurrency 1 4 16] [--picture] [--prompts_beside] [--cpu_time]

FOLDER is one that ``models.py`` wrote. Prompts and pictures all differ, so nothing is found again.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch
from models import word
from PIL import Image

from mmtool.engine.base import Delta, Request, Sampling, request_from
from mmtool.engine.create import create_engine
from mmtool.loader import get_template, load_model, open_folder


def prompt_words(rng: random.Random, count: int) -> str:
    """Return a text of ``count`` tokens."""
    return " ".join(word(rng.randrange(10**6)) for _ in range(count))


def picture(rng: random.Random) -> Image.Image:
    """Return a picture of 224 pixels that no other is like."""
    return Image.frombytes("RGB", (224, 224), rng.randbytes(224 * 224 * 3))


def make_requests(template, count: int, words: int, new_tokens: int, pictures: bool) -> list[Request]:
    """Return requests whose answers are all ``new_tokens`` long."""
    rng = random.Random(count)
    requests = []
    for _ in range(count):
        content: list[dict] = [{"type": "text", "text": prompt_words(rng, words)}]
        if pictures:
            content.insert(0, {"type": "image", "image": picture(rng)})
        request = request_from(template, [{"role": "user", "content": content}], Sampling(max_new_tokens=new_tokens))
        request.stop_words = request.stop_token_ids = ()
        requests.append(request)
    return requests


def run(engine, requests: list[Request], clock) -> tuple[float, list[float]]:
    """Answer all requests, as many at once as the engine takes; return the seconds and the times to first token."""
    engine.clear(features=True)
    first: list[float] = []
    tokens = 0
    start = clock()
    delta: Delta
    for delta in engine.generate(requests):
        tokens += len(delta.token_ids)
        if delta.usage is not None:
            first.append(delta.usage.time_to_first_token)
    return clock() - start, first


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--picture", action="store_true")
    parser.add_argument("--words", type=int, default=115)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="Answers per asker.")
    parser.add_argument("--repeats", type=int, default=3, help="The best of so many runs is shown.")
    parser.add_argument("--prompts_beside", action="store_true", help="Compute them in a second thread.")
    parser.add_argument("--cpu_time", action="store_true", help="Count CPU seconds, for a busy machine.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if args.cpu_time else time.perf_counter
    spec, folder = open_folder("auto", args.folder)
    model, processor = load_model(spec, folder)
    template = get_template(spec, processor)
    print(f"{args.folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {model.dtype}")
    print("| askers | tokens/s | median time to first token, ms | prompt tokens |\n|---|---|---|---|")
    for askers in args.concurrency:
        requests = make_requests(template, askers * args.rounds, args.words, args.new_tokens, args.picture)
        engine = create_engine(
            model, processor, "pt", max_batch_size=askers, max_model_len=1024, preallocate=True, pack_weights=None,
            prompts_beside=args.prompts_beside,
        )  # fmt: skip
        runs = [run(engine, requests, clock) for _ in range(args.repeats)]
        seconds, first = min(runs)
        speed = len(requests) * args.new_tokens / seconds
        middle = 1000 * statistics.median(first)
        print(f"| {askers} | {speed:.1f} | {middle:.0f} | {len(requests[0].input_ids)} |", flush=True)


if __name__ == "__main__":
    main()
