"""Compare the pt engine with transformers' ``generate``: same model object, same prompts, greedy, no end token.

Both do the whole call: vision tower, prompt, new tokens; the engine forgets everything between calls and also makes the
text. Calls alternate within one run, because a shared machine changes its speed; read the ratio, which is the median of
the ratios of neighbouring calls.

    python examples/bench/decode.py [--model_id_or_path FOLDER] [--batch_sizes 1 8] [--threads 1 2] [--pictures 0]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from PIL import Image

from mmtool.engine.base import Request, Sampling, request_from
from mmtool.engine.create import create_engine
from mmtool.loader import get_template, load_model, open_folder

WORDS = ["how", "many", "red", "green", "blue", "shapes", "are", "in", "this", "picture", "and", "where", "they", "are"]


def make_requests(template, count: int, pictures: int, new_tokens: int) -> list[Request]:
    """Return prompts of equal length, each with its own picture and words, without anything that ends an answer."""
    requests = []
    for row in range(count):
        content = [{"type": "text", "text": " ".join(WORDS[row % 4 :] + WORDS[: row % 4])}]
        if pictures:
            colour = (20 * row % 256, 255 - 20 * row % 256, 90)
            content.insert(0, {"type": "image", "image": Image.new("RGB", (160, 120), colour)})
        request = request_from(template, [{"role": "user", "content": content}], Sampling(max_new_tokens=new_tokens))
        request.stop_words = request.stop_token_ids = ()
        requests.append(request)
    return requests


def generate(model, template, requests: list[Request], new_tokens: int) -> list[tuple[int, ...]]:
    """Answer with transformers."""
    encoded = []
    for request in requests:
        row = {"input_ids": request.input_ids, "media": request.media}
        encoded.append(row | {name: tensor for item in request.media for name, tensor in item.inputs.items()})
    inputs = template.collate(encoded)
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
    return [tuple(row[length:].tolist()) for row in ids]


def answer(engine, requests: list[Request]) -> list[tuple[int, ...]]:
    """Answer with the engine, which has seen nothing before."""
    engine.clear(features=True)
    ids: list[tuple[int, ...]] = [()] * len(requests)
    for delta in engine.generate(requests):
        ids[delta.index] += delta.token_ids
    return ids


def compare(calls: Sequence[Callable[[], object]], repeats: int, clock: Callable[[], float]) -> list[list[float]]:
    """Return the seconds of both calls, again and again, in changing order."""
    pairs = []
    for repeat in range(repeats):
        pair = [0.0, 0.0]
        for which in (0, 1) if repeat % 2 else (1, 0):
            start = clock()
            calls[which]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            pair[which] = clock() - start
        pairs.append(pair)
    return pairs


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_type")
    parser.add_argument("--model_id_or_path")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--pictures", type=int, choices=(0, 1), default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cpu_time", action="store_true", help="Count CPU seconds, for a busy machine (1 thread).")
    args = parser.parse_args()

    model_type = args.model_type or (None if args.model_id_or_path else "tiny")
    spec, folder = open_folder(model_type, args.model_id_or_path)
    model, processor = load_model(spec, folder)
    template = get_template(spec, processor)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    print("| threads | batch | generate, tokens/s | engine, tokens/s | ratio | same ids |")
    print("|---|---|---|---|---|---|")
    for threads in args.threads:
        torch.set_num_threads(threads)
        for batch_size in args.batch_sizes:
            requests = make_requests(template, batch_size, args.pictures, args.new_tokens)
            engine = create_engine(model, processor, "pt", max_batch_size=batch_size)
            calls = (
                lambda requests=requests: generate(model, template, requests, args.new_tokens),
                lambda engine=engine, requests=requests: answer(engine, requests),
            )
            same = calls[0]() == calls[1]()  # also warms both up
            pairs = compare(calls, args.repeats, time.process_time if args.cpu_time else time.perf_counter)
            tokens = batch_size * args.new_tokens
            speeds = [tokens / statistics.median(column) for column in zip(*pairs, strict=True)]
            ratio = statistics.median(one / other for one, other in pairs)
            figures = f"{speeds[0]:.0f} | {speeds[1]:.0f} | {ratio:.2f}"
            print(f"| {threads} | {batch_size} | {figures} | {'yes' if same else 'no'} |", flush=True)


if __name__ == "__main__":
    main()
