"""Train the tiny model from nothing: tokenizer, pictures drawn on the fly, training and export, without downloads."""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path

import sentencepiece as spm
import torch
import torch.nn.functional as F
from model import Dims, TinyVL, save_release
from pictures import MARKS, make_picture, pad_and_resize
from questions import next_turn
from rows import IGNORE, Mix, Pictures, Row, Steps, stack
from tokenizer import load_tokenizer, train_tokenizer
from torch import Tensor, nn

HERE = Path(__file__).parent
CHECKPOINT = HERE.parent.parent / "mmtool" / "models" / "tiny" / "checkpoint"
HELD_OUT_SEED = 987_654_321


def parse_args() -> argparse.Namespace:
    """Read the command line; every size of the model is an option too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="folder to write the finished checkpoint to")
    parser.add_argument(
        "--run", type=Path, default=HERE / "runs" / "default", help="folder for the log and the resumable state"
    )
    parser.add_argument("--steps", type=int, default=11250, help="steps of all together")
    parser.add_argument("--stop", type=int, default=0, help="stop after this step, to be resumed later (0: at the end)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--min-lr", type=float, default=2e-5)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights that are exported")
    parser.add_argument("--batch", type=float, default=1.0, help="multiply the pictures of a step by this")
    parser.add_argument("--marks", type=float, default=0.5, help="weight of the task of the ViT alone; it fades out")
    parser.add_argument(
        "--sums", type=float, default=Mix().text_kinds["sum"], help="share of sums in the pictures of text"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads for the model (0: all)")
    parser.add_argument(
        "--processes", type=int, default=1, help="share each step among processes, on a CPU: one per core"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that draw pictures, for each training process"
    )
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    parser.add_argument("--float32", action="store_true", help="train without bfloat16 autocast")
    parser.add_argument(
        "--vit-steps", type=int, default=1400, help="steps that train the ViT alone, before all the rest"
    )
    parser.add_argument("--vit", type=Path, help="start with this trained ViT, a vit.pt that an earlier run left")
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--resume", action="store_true", help="continue from the state in --run")
    for item in fields(Dims):
        parser.add_argument(f"--{item.name.replace('_', '-')}", type=int, default=item.default)
    return parser.parse_args()


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Rise linearly, then fall along a cosine until the last step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.min_lr + (args.lr - args.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def inner_matrices(model: nn.Module) -> list[nn.Parameter]:
    """List the matrices inside the layers, which Muon is made for."""
    outer = ("embed", "lm_head")
    return [p for name, p in model.named_parameters() if p.ndim == 2 and not any(word in name for word in outer)]


def make_optimizers(model: nn.Module, args: argparse.Namespace, rank: int = 0) -> list[torch.optim.Optimizer]:
    """Use Muon for the matrices inside the layers and AdamW for the rest, or AdamW alone; only matrices decay.

    Muon is costly, so each process only updates its share of the matrices, see share_matrices."""
    muon = inner_matrices(model) if args.optimizer == "muon" else []
    inner, taken = muon[rank :: args.processes], {id(p) for p in muon}
    outer = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in taken]
    small = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": outer, "weight_decay": args.weight_decay}, {"params": small, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-8, fused=True)
    ]
    if inner:
        optimizers.append(
            torch.optim.Muon(inner, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


def answer_loss(model: TinyVL, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of the answer tokens."""
    where = (labels != IGNORE).flatten().nonzero().squeeze(1)
    # Rounded up, because on a CPU every new matrix size costs a new kernel. Position 0 never has a label.
    where = F.pad(where, (0, -len(where) % 256))
    logits = model.llm.lm_head(hidden.flatten(0, 1)[where]).float()
    return F.cross_entropy(logits, labels.flatten()[where], ignore_index=IGNORE)


def mark_loss(head: nn.Linear, patches: Tensor, marks: Tensor) -> Tensor:
    """Return the cost of not knowing from a patch's features which character or shape has its centre there.

    This teaches the ViT directly, long before the language model's answers could. The head is not exported."""
    wanted = marks.to(patches.device, torch.float32)
    cost = F.binary_cross_entropy_with_logits(head(patches).float(), wanted, reduction="sum")
    return cost / (wanted.sum() + 1)


def held_out(sp: spm.SentencePieceProcessor, dims: Dims, seed: int, count: int) -> list[dict]:
    """Draw single-question conversations that no training seed produces, in batches of one length."""
    rng = random.Random(seed)
    batches, rows = [], []
    while len(batches) * 64 < count:
        kind = rng.choice(("shapes", "shapes", "shapes", "digits", "word", "sum"))
        image, scene = make_picture(rng, kind)
        row = Row(sp, 60, dims.image_tokens)
        lang = rng.choice(("en", "zh"))
        turn = next_turn(rng, scene, lang, None)
        if turn.task.startswith(("chat", "no_", "typed")) and rng.random() < 0.7:
            continue
        if row.add(turn, pad_and_resize(image, dims.image_size)):
            row.first_task = turn.task if turn.task != "describe" else f"describe_{scene.kind}"
            rows.append(row)
        if len(rows) == 64:
            batches.append({**stack(rows, 60 + dims.image_tokens), "tasks": [r.first_task for r in rows]})
            rows = []
    return batches


@torch.no_grad()
def quick_accuracy(model: TinyVL, batches: list[dict], device: torch.device, autocast: bool) -> dict[str, float]:
    """Return the share of answers whose every token is the most likely one: what greedy decoding would write."""
    right, total = Counter(), Counter()
    model.eval()
    for batch in batches:
        labels = batch["labels"].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            hidden, _ = model.trunk(batch["ids"].to(device), batch["pixels"].to(device))
            guesses = model.llm.lm_head(hidden).argmax(-1)
        good = ((guesses == labels) | (labels == IGNORE)).all(1).tolist()
        for task, ok in zip(batch["tasks"], good, strict=True):
            total[task] += 1
            right[task] += ok
    model.train()
    return {task: round(right[task] / total[task], 3) for task in sorted(total)}


class Log:
    """Write lines to the screen and to a file."""

    def __init__(self, path: Path, active: bool = True) -> None:
        self.path, self.active = path, active

    def __call__(self, text: str) -> None:  # noqa: D102
        if not self.active:
            return
        print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def prepare(args: argparse.Namespace) -> tuple[Dims, Mix]:
    """Make the folders and the tokenizer; return the sizes and the make-up of a step."""
    dims = Dims(**{item.name: getattr(args, item.name) for item in fields(Dims)})
    args.run.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.run / "tokenizer.model").exists():
        train_tokenizer(args.run, dims.vocab_size)
    base = Mix()
    rest = (1 - args.sums) / (1 - base.text_kinds["sum"])
    kinds = {kind: args.sums if kind == "sum" else share * rest for kind, share in base.text_kinds.items()}
    share = args.batch / args.processes
    # A row with a second picture has room for a few short turns besides.
    mix = Mix(
        shape_length=max(base.shape_length, dims.image_tokens + 48),
        shape_rows=round(base.shape_rows * share),
        text_rows=round(base.text_rows * share),
        two_pictures=max(1, round(base.two_pictures * share)),
        text_kinds=kinds,
    )
    return dims, mix


def export(model: TinyVL, weights: dict[str, Tensor], args: argparse.Namespace) -> None:
    """Write the checkpoint folder: weights, configuration and tokenizer."""
    save_release(model, weights, args.out)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        (args.out / name).write_bytes((args.run / name).read_bytes())


def main() -> None:
    """Train in one process or several."""
    args = parse_args()
    dims, mix = prepare(args)
    if args.processes == 1:
        run(0, args, dims, mix)
        return
    (args.run / "meeting").unlink(missing_ok=True)
    torch.multiprocessing.spawn(run, (args, dims, mix), nprocs=args.processes)


def run(rank: int, args: argparse.Namespace, dims: Dims, mix: Mix) -> None:
    """Train, report and export; with several processes each one does its share of every step."""
    torch.manual_seed(args.seed)
    if args.processes > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{(args.run / 'meeting').resolve()}", rank=rank, world_size=args.processes
        )
    if args.threads or args.processes > 1:
        torch.set_num_threads(args.threads or 1)
    log = Log(args.run / "log.txt", rank == 0)
    device = torch.device(args.device)
    model = TinyVL(dims).to(device)
    optimizers = make_optimizers(model, args, rank)
    head = nn.Linear(dims.vit_hidden, MARKS).to(device)
    nn.init.constant_(head.bias, -6.0)  # most marks are absent from most patches
    optimizers.append(torch.optim.AdamW(head.parameters(), lr=args.lr))
    named = dict(model.named_parameters())
    average = {name: p.detach().clone() for name, p in named.items()}
    first = 0
    if args.resume:
        state = torch.load(args.run / "state.pt", map_location=device)
        model.load_state_dict(state["model"])
        if state.get("head", {}).get("weight", head.weight[:1]).shape == head.weight.shape:
            head.load_state_dict(state["head"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            if not isinstance(optimizer, torch.optim.Muon):  # its short memory is soon built up again
                optimizer.load_state_dict(saved)
        average, first = state["average"], state["step"]
    if args.vit:
        saved = torch.load(args.vit, map_location=device)
        model.vision.load_state_dict(saved["vision"])
        head.load_state_dict(saved["head"])
    count = sum(p.numel() for p in named.values())
    log(f"{count / 1e6:.2f} million parameters, {mix.shape_rows}+{mix.text_rows} rows, steps {first} to {args.steps}")
    if args.vit_steps:
        train_vit(args, model, head, optimizers, rank, mix, log)
    if args.vit_steps or args.vit:
        for name in average:
            if name.startswith("vision."):
                average[name].copy_(named[name].detach())
    last = args.stop or args.steps
    seed = args.seed + 1000 * rank
    data = Steps(seed, first, last, str(args.run / "tokenizer.model"), mix, dims.image_size, dims.image_tokens)
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=args.workers, prefetch_factor=8 if args.workers else None
    )
    checks = held_out(load_tokenizer(args.run), dims, HELD_OUT_SEED, 1536) if rank == 0 else []
    trunk = model.trunk if args.no_compile else torch.compile(model.trunk, dynamic=False)
    train(args, model, head, trunk, optimizers, loader, checks, log, first, average)
    if rank == 0:
        export(model, average, args)
        log(f"wrote {args.out}")


def share_gradients(params: list[nn.Parameter], processes: int) -> None:
    """Replace each gradient by its mean over all processes."""
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    torch.distributed.all_reduce(flat)
    flat /= processes
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def share_matrices(model: nn.Module, args: argparse.Namespace) -> None:
    """Give the matrices that each process has updated to all the others."""
    if args.processes == 1 or args.optimizer != "muon":
        return
    for rank in range(args.processes):
        mine = [p.data for p in inner_matrices(model)[rank :: args.processes]]
        flat = torch.cat([p.flatten() for p in mine])
        torch.distributed.broadcast(flat, rank)
        for p, part in zip(mine, flat.split([p.numel() for p in mine]), strict=True):
            p.copy_(part.view_as(p))


def train_vit(args, model, head, optimizers, rank: int, mix: Mix, log: Log) -> None:
    """Train the ViT alone to name what is in each patch; a quarter of the cost of a whole step, picture by picture."""
    device, grid = next(model.parameters()).device, model.dims.image_size // model.dims.patch_size
    count = round(128 * args.batch / args.processes)
    data = Pictures(args.seed + 1000 * rank, 0, args.vit_steps, count, mix, model.dims.image_size, grid)
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=args.workers, prefetch_factor=8 if args.workers else None
    )
    look = model.look if args.no_compile else torch.compile(model.look, dynamic=False)
    params = [*model.vision.parameters(), *head.parameters()]
    losses, start = [], time.time()
    for step, [batch] in enumerate(loader):
        rise, fall = (step + 1) / args.warmup, 1 - 0.7 * step / args.vit_steps
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(rise, fall)
        with torch.autocast(device.type, torch.bfloat16, enabled=not args.float32):
            loss = mark_loss(head, look(batch["pixels"].to(device)), batch["marks"])
        loss.backward()
        losses.append(loss.item())
        if args.processes > 1:
            share_gradients(params, args.processes)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        share_matrices(model, args)
        if (step + 1) % 50 == 0:
            rate = 50 * count * args.processes / (time.time() - start)
            log(f"ViT step {step + 1} marks {sum(losses) / 50:.3f} {rate:.1f} pictures/s")
            losses, start = [], time.time()
        if log.active and ((step + 1) % args.save_every == 0 or step + 1 == args.vit_steps):
            torch.save({"vision": model.vision.state_dict(), "head": head.state_dict()}, args.run / "vit.pt")


def train(args, model, head, trunk, optimizers, loader, checks, log, first, average) -> None:
    """Run the training steps; `average` holds the averaged weights and is updated in place."""
    device, autocast = next(model.parameters()).device, not args.float32
    names = list(average)
    live, mean = [dict(model.named_parameters())[n].data for n in names], [average[n] for n in names]
    losses: list[float] = []
    marks: list[float] = []
    start, pictures = time.time(), 0
    for step, batches in enumerate(loader, first):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, step)
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                hidden, patches = trunk(batch["ids"].to(device), batch["pixels"].to(device))
                loss = answer_loss(model, hidden, batch["labels"].to(device))
                seen = mark_loss(head, patches, batch["marks"])
            ((loss + args.marks * (1 - step / args.steps) * seen) / len(batches)).backward()
            marks.append(seen.item())
            losses.append(loss.item())
            pictures += len(batch["pixels"]) * args.processes
        if args.processes > 1:
            share_gradients([*model.parameters(), *head.parameters()], args.processes)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        share_matrices(model, args)
        model.zero_grad(set_to_none=True)
        head.zero_grad(set_to_none=True)
        torch._foreach_lerp_(mean, live, 1 - min(args.ema, (step + 1) / (step + 10)))
        done = step + 1
        if done % 50 == 0:
            shape, text = sum(losses[0::2]) / len(losses[0::2]), sum(losses[1::2]) / max(1, len(losses[1::2]))
            rate = pictures / (time.time() - start)
            log(
                f"step {done} loss {shape:.4f} {text:.4f} marks {sum(marks[::2]) / 50:.3f} {sum(marks[1::2]) / 50:.3f} "
                f"lr {learning_rate(args, step):.2e} {rate:.1f} pictures/s"
            )
            losses, marks, start, pictures = [], [], time.time(), 0
        if done % args.eval_every == 0 and log.active:
            kept = [p.clone() for p in live]
            torch._foreach_copy_(live, mean)
            log(json.dumps({"step": done, **quick_accuracy(model, checks, device, autocast)}))
            torch._foreach_copy_(live, kept)
            start, pictures = time.time(), 0
        if log.active and (done % args.save_every == 0 or done == (args.stop or args.steps)):
            torch.save(
                {
                    "model": model.state_dict(),
                    "head": head.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "average": average,
                    "step": done,
                },
                args.run / "state.part",
            )
            (args.run / "state.part").replace(args.run / "state.pt")


if __name__ == "__main__":
    main()
