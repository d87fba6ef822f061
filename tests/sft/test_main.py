"""`mmtool sft` in this process: what it writes, going on exactly, and what it does when something goes wrong."""

import base64
import errno
import importlib.util
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from mmtool.args import InferArgs, SftArgs
from mmtool.data.train import EncodedRows
from mmtool.errors import DataError, MMToolError
from mmtool.finetuned import attach_adapter, checkpoint_steps, open_finetuned
from mmtool.infer.main import infer_main
from mmtool.loader import load_model, open_folder
from mmtool.options import read_args
from mmtool.sft import trainer as trainer_module
from mmtool.sft.learner import Learner
from mmtool.sft.main import sft_main
from mmtool.sft.places import with_saved_options
from mmtool.sft.progress import Progress, read_log
from mmtool.sft.trainer import SftTrainer

Make = Callable[..., SftArgs]


def losses(run: Path, name: str = "loss") -> dict[int, float]:
    return {line["step"]: line[name] for line in read_log(run / "logging.jsonl") if name in line}


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    found = [load_file(path) for path in sorted(checkpoint.rglob("*.safetensors"))]
    return {name: tensor for file in found for name, tensor in file.items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def ran(data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with dropout and evaluations, checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("ran")
    words = ["--dataset", str(data_file), "--dataset_test_ratio", "0.2", "--max_steps", "4", "--save_steps", "2"]
    words += ["--logging_steps", "1", "--batch_size", "4", "--output_dir", str(folder), "--add_output_dir_suffix=false"]
    words += ["--lora_dropout", "0.1", "--dataloader_num_workers", "1"]
    sft_main(read_args(SftArgs, words, "mmtool sft"))
    return folder


def test_a_run_leaves_what_the_docs_say(ran: Path) -> None:
    names = {path.name for path in ran.iterdir()}
    assert names >= {
        "sft_args.json",
        "logging.jsonl",
        "runs",
        "images",
        "checkpoints.json",
        "val_dataset.jsonl",
        "data",
    }
    assert [step for step, _ in checkpoint_steps(ran)] == [2, 4]
    assert set(losses(ran)) == {1, 2, 3, 4}
    assert set(losses(ran, "eval_loss")) == {2, 4}
    assert {path.name for path in (ran / "images").iterdir()} >= {"loss.png", "eval_loss.png", "learning_rate.png"}
    assert json.loads((ran / "checkpoints.json").read_text())["last"] == "checkpoint-4"
    assert json.loads((ran / "sft_args.json").read_text())["infer"]["model_type"] == "tiny"
    assert not [name for name in names if name.startswith(".")]


def test_going_on_gives_the_same_losses_and_weights_to_the_last_bit(ran: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(ran, again)
    shutil.rmtree(again / "checkpoint-4")
    words = ["--resume_from_checkpoint", str(again)]
    sft_main(with_saved_options(read_args(SftArgs, words, "mmtool sft")))
    assert losses(again) == losses(ran)
    assert losses(again, "eval_loss") == losses(ran, "eval_loss")
    assert_equal(weights(again / "checkpoint-4"), weights(ran / "checkpoint-4"))


def test_full_weights_go_on_exactly_as_well(sft_args: Make, tmp_path: Path) -> None:
    options = {"sft_type": "full", "max_steps": 3, "save_steps": 1, "save_total_limit": 0, "learning_rate": 1e-4}
    sft_main(sft_args(**options))
    run, again = tmp_path / "run", tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoint-2")
    shutil.rmtree(again / "checkpoint-3")
    sft_main(sft_args(**options, output_dir=str(again), resume_from_checkpoint=str(again / "checkpoint-1")))
    assert losses(again) == losses(run)
    assert_equal(weights(again / "checkpoint-3"), weights(run / "checkpoint-3"))
    spec, folder = open_folder(None, run / "checkpoint-3")
    assert spec.model_type == "tiny"
    model, _ = load_model(spec, folder)
    base, _ = load_model(*open_folder("tiny"))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, base.get_parameter(name))}
    assert changed
    assert not [name for name in changed if "vision_tower" in name]


def test_the_adapter_loads_with_plain_peft_and_with_ours(ran: Path) -> None:
    ids = torch.arange(5, 25).unsqueeze(0)
    folder = ran / "checkpoint-4"
    with torch.no_grad():
        base, _ = load_model(*open_folder("tiny"))
        before = base(input_ids=ids).logits
        plain = PeftModel.from_pretrained(load_model(*open_folder("tiny"))[0], folder).eval()(input_ids=ids).logits
        ours = attach_adapter(load_model(*open_folder("tiny"))[0], folder)(input_ids=ids).logits
        merged = attach_adapter(load_model(*open_folder("tiny"))[0], folder, merge=True)(input_ids=ids).logits
    assert torch.equal(ours, plain)
    assert not torch.equal(ours, before)
    torch.testing.assert_close(merged, ours, atol=1e-4, rtol=0)


def test_an_adapter_with_a_random_start_is_saved_as_a_plain_one_and_goes_on_exactly(
    sft_args: Make, tmp_path: Path
) -> None:
    """PiSSA by random SVD takes a part out of the frozen weights that nobody could draw again."""
    options = {"init_lora_weights": "pissa_niter_4", "learning_rate": 1e-2, "save_steps": 1, "save_total_limit": 0}
    sft_main(sft_args(**options))
    run, again = tmp_path / "run", tmp_path / "again"
    ids = torch.arange(5, 25).unsqueeze(0)
    first = load_model(*open_folder("tiny"))[0]
    torch.manual_seed(1)
    with torch.no_grad():
        before = first(input_ids=ids).logits
        plain = PeftModel.from_pretrained(first, run / "checkpoint-2").eval()
        ours = attach_adapter(load_model(*open_folder("tiny"))[0], run / "checkpoint-2", merge=True)
        found = plain(input_ids=ids).logits
        torch.testing.assert_close(ours(input_ids=ids).logits, found, atol=1e-4, rtol=0)
    assert not torch.allclose(found, before, atol=0.1)
    assert plain.peft_config["default"].r == 16
    raw = load_file(run / "checkpoint-2" / "trainable.safetensors")
    assert {min(tensor.shape) for tensor in raw.values()} == {8}
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoint-2")
    sft_main(with_saved_options(read_args(SftArgs, ["--resume_from_checkpoint", str(again)], "mmtool sft")))
    assert losses(again) == losses(run)
    assert_equal(weights(again / "checkpoint-2"), weights(run / "checkpoint-2"))


def test_smoothed_labels_change_the_training_and_not_the_evaluation(sft_args: Make, tmp_path: Path) -> None:
    options = {"dataset_test_ratio": 0.2, "learning_rate": 0.0, "max_steps": 1, "save_steps": 1}
    sft_main(sft_args(**options))
    sft_main(sft_args(**options, training_args=["label_smoothing_factor=0.2"], output_dir=str(tmp_path / "smooth")))
    assert losses(tmp_path / "smooth", "eval_loss") == pytest.approx(losses(tmp_path / "run", "eval_loss"))
    assert abs(losses(tmp_path / "smooth")[1] - losses(tmp_path / "run")[1]) > 0.01


def test_a_resumed_run_takes_over_what_it_was_told(sft_args: Make, tmp_path: Path) -> None:
    sft_main(sft_args(max_steps=1, save_steps=1, save_total_limit=7, nproc_per_node=1))
    words = ["--resume_from_checkpoint", "last", "--output_dir", str(tmp_path / "run"), "--batch_size", "3"]
    args = with_saved_options(read_args(SftArgs, words, "mmtool sft"))
    assert (args.run.save_total_limit, args.run.logging_steps, args.devices.nproc_per_node) == (7, 1, 1)
    assert args.train.batch_size == 3


def test_few_bits_are_refused_where_the_package_is_missing(sft_args: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(MMToolError, match="--quantization_bit 4 needs the package bitsandbytes"):
        sft_main(sft_args(quantization_bit="4"))


@pytest.mark.parametrize("bits", ["4", "8"])
def test_adapters_train_beside_weights_of_few_bits(sft_args: Make, tmp_path: Path, bits: str) -> None:
    pytest.importorskip("bitsandbytes")
    sft_main(sft_args(quantization_bit=bits, tune_vision_proj="true", max_steps=2))
    parts = json.loads((tmp_path / "run" / "sft_args.json").read_text())["parts"]
    assert parts["llm"]["parameters"] > 3_000_000, "all of them count"
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run").values())
    saved = weights(tmp_path / "run" / "checkpoint-2")
    assert all(tensor.is_floating_point() for tensor in saved.values())


def test_infer_answers_the_rows_that_the_run_kept(ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result = tmp_path / "answers.jsonl"
    words = ["--ckpt_dir", str(ran), "--load_dataset_config", "true", "--result_path", str(result)]
    infer_main(read_args(InferArgs, [*words, "--max_new_tokens", "2"], "mmtool infer"))
    answers = [json.loads(line) for line in result.read_text(encoding="utf-8").splitlines()]
    kept = (ran / "val_dataset.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answers) == len(kept) == 3
    assert all(answer["label"] and answer["response"] is not None for answer in answers)


def test_a_checkpoint_alone_knows_its_prompt(sft_args: Make, tmp_path: Path) -> None:
    sft_main(sft_args(system="Be brief.", max_steps=1, processor_kwargs={"do_normalize": True}))
    (tmp_path / "run" / "checkpoint-1").rename(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    finetuned = open_finetuned(tmp_path / "run")
    args = read_args(InferArgs, ["--ckpt_dir", str(tmp_path / "run")], "mmtool infer")
    finetuned.fill(args.model, args.explicit)
    assert args.model.model_type == "tiny"
    assert args.model.processor_kwargs == {"do_normalize": True}
    args = read_args(InferArgs, ["--ckpt_dir", str(tmp_path / "run")], "mmtool infer")
    finetuned.fill(args.template, args.explicit)
    assert args.template.system == "Be brief."
    args = read_args(InferArgs, ["--system", "", "--ckpt_dir", str(tmp_path / "run")], "mmtool infer")
    finetuned.fill(args.template, args.explicit)
    assert args.template.system == ""


def test_packed_rows_and_named_modules_train(sft_args: Make, tmp_path: Path) -> None:
    sft_main(sft_args(packing=True, max_length=256, modules_to_save=["lm_head"], tune_vision_proj="true"))
    saved = weights(tmp_path / "run" / "checkpoint-2")
    assert any("lm_head" in name for name in saved)
    assert any("multi_modal_projector" in name for name in saved)


def turns(*contents: Any, keys: tuple[str, str], roles: tuple[str, str]) -> list[dict[str, Any]]:
    return [{keys[0]: role, keys[1]: content} for role, content in zip(roles, contents, strict=True)]


def test_files_of_every_format_train_in_one_run(sft_args: Make, tmp_path: Path) -> None:
    folder = tmp_path / "Daten 数据"
    (folder / "bilder").mkdir(parents=True)
    name = "bilder/ä 1.png"
    PIL.Image.new("RGB", (40, 30), "red").save(folder / name)
    uri = "data:image/png;base64," + base64.b64encode((folder / name).read_bytes()).decode()
    old, new = ("from", "value"), ("role", "content")
    chat, bot, plain = ("human", "gpt"), ("user", "assistant"), {"query": "q", "response": "r"}
    rows: dict[str, Any] = {
        "swift": {**plain, "history": [["a", "b"]], "images": [None, name]},
        "inline": {"conversations": turns(f"<img>{name}</img>What?", "A cup.", keys=old, roles=bot)},
        "messages": {"messages": turns([{"type": "image_url", "image_url": {"url": uri}}], "a", keys=new, roles=bot)},
        "sharegpt": {"conversations": turns("<image>What?", "A cup.", keys=old, roles=chat), "images": [name]},
        "alpaca": {"instruction": "Translate.", "input": "cat", "output": "chat"},
        "megrez": {"conversations": turns({"text": "What?", "image": name}, {"text": "A cup."}, keys=new, roles=bot)},
        "xcomposer": {"image": [name], "conversations": turns("<ImageHere>?", "B", keys=old, roles=("human", "bot"))},
        "minicpm": {"image": {"<image_00>": name}, "conversations": turns("<image_00>?", "B", keys=new, roles=bot)},
        "fm9g": {"input": "<用户>Name a river.<AI>", "output": "The Yangtze."},
        "yi": {"prompt": "Human: Hi Assistant:", "chosen": "Hello."},
        "llava": {"image": name, "conversations": turns("<image>\nWhat?", "A cup.", keys=old, roles=chat)},
        "text": {"text": "Running text."},
    }
    for number, (kind, row) in enumerate(rows.items()):
        if number % 2:
            (folder / f"{kind}.json").write_text(json.dumps([row], ensure_ascii=False), encoding="utf-8")
        else:  # with a byte order mark, blank lines, and line ends of Windows
            text = "\r\n" + json.dumps(row) + "\r\n  \r\n"
            (folder / f"{kind}.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (folder / "flat.csv").write_text(f'frage,antwort,images\n"q, r\ns",a,{name}\n', encoding="utf-8-sig")
    columns = {"frage": "query", "antwort": "response"}
    sft_main(sft_args(dataset=[str(folder)], columns=columns, check_dataset="strict", batch_size=7))
    told = json.loads((tmp_path / "run" / "sft_args.json").read_text(encoding="utf-8"))["data"]
    assert (told["train_rows"], told["dropped"], told["media"]["image"]["number"]) == (13, 0, 9)
    assert set(losses(tmp_path / "run")) == {1, 2}


def test_evaluations_that_get_no_better_end_the_run(
    sft_args: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(self: SftTrainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {"eval_loss": {2: 1.0, 3: 0.5}.get(self.state.global_step, 2.0)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    monkeypatch.setattr(SftTrainer, "evaluate", evaluate)
    options = {"early_stop": 2, "max_steps": 9, "save_steps": 1, "dataset_test_ratio": 0.2, "save_total_limit": 1}
    sft_main(sft_args(**options))
    assert max(losses(tmp_path / "run")) == 5
    assert [step for step, _ in checkpoint_steps(tmp_path / "run")] == [3, 5], "the best and the last"
    assert open_finetuned(tmp_path / "run").folder.name == "checkpoint-3"


def test_the_best_checkpoint_is_one_that_was_saved(
    sft_args: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Evaluations between checkpoints may be better; but nobody could open those."""
    caplog.set_level("INFO")
    options = {"learning_rate": 0.0, "eval_steps": 1, "save_steps": 2, "max_steps": 3, "dataset_test_ratio": 0.2}
    sft_main(sft_args(**options))
    run = tmp_path / "run"
    evaluated = losses(run, "eval_loss")
    assert set(evaluated) == {1, 2, 3}
    noted = json.loads((run / "checkpoints.json").read_text())
    assert noted == {"last": "checkpoint-3", "best": "checkpoint-2", "best_eval_loss": pytest.approx(evaluated[2])}
    assert "best: " + str(run / "checkpoint-2") in caplog.text


# When something goes wrong ------------------------------------------------------------------------------------------


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Do something at the end of a step."""
    before = Progress.on_step_end

    def on_step_end(self: Progress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before(self, args, state, control, **kwargs)
        if state.global_step == step:
            action()

    monkeypatch.setattr(Progress, "on_step_end", on_step_end)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_ends(
    sft_args: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    at_step(monkeypatch, 1, lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt):
        sft_main(sft_args(max_steps=5))
    assert [step for step, _ in checkpoint_steps(tmp_path / "run")] in ([1], [2])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    sft_args: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = trainer_module.save_model

    def fail_later(learner: Learner, folder: Path, *args: Any, **kwargs: Any) -> None:
        save(learner, folder, *args, **kwargs)
        if "checkpoint-2" in folder.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trainer_module, "save_model", fail_later)
    with pytest.raises(MMToolError, match="No space left on device"):
        sft_main(sft_args(save_steps=1, max_steps=3))
    assert [step for step, _ in checkpoint_steps(tmp_path / "run")] == [1]
    assert weights(tmp_path / "run" / "checkpoint-1")


@pytest.mark.parametrize("place", ["data", "sft_args.json", "logging.jsonl", "val_dataset.jsonl"])
def test_a_disk_that_is_full_at_any_time_is_a_plain_error(
    sft_args: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Every file of the run is written through ``open``: the disk takes no more than the first checkpoint."""
    opened = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        name = str(self).partition(str(tmp_path / "run"))[2].strip("/")
        later = (tmp_path / "run" / "checkpoint-1").is_dir() or place != "logging.jsonl"
        if name.startswith(place) and not mode.startswith("r") and later:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(MMToolError, match="No space left on device") as error:
        sft_main(sft_args(save_steps=1, max_steps=3, dataset_test_ratio=0.2))
    found = [path.name for _, path in checkpoint_steps(tmp_path / "run")]
    assert found == (["checkpoint-1"] if place == "logging.jsonl" else [])
    assert ("checkpoint-1 is intact" in str(error.value.hint)) == bool(found)


def spoil(monkeypatch: pytest.MonkeyPatch, passes: set[int]) -> list[int]:
    """Make the loss of some passes no number."""
    forward, seen = Learner.forward, []

    def spoiled(self: Learner, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        output = forward(self, *args, **kwargs)
        seen.append(len(seen) + 1)
        return {"loss": output["loss"] * float("nan"), "total": output["total"]} if seen[-1] in passes else output

    monkeypatch.setattr(Learner, "forward", spoiled)
    return seen


def test_a_loss_that_is_no_number_is_left_out(
    sft_args: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen = spoil(monkeypatch, {2})
    sft_main(sft_args(save_steps=1, max_steps=3, learning_rate=1e-3))
    assert len(seen) == 3
    run = tmp_path / "run"
    assert_equal(weights(run / "checkpoint-2"), weights_of_step(run, 1) or weights(run / "checkpoint-2"))
    assert all(torch.isfinite(tensor).all() for tensor in weights(run / "checkpoint-3").values())
    told = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
    assert len(told) == 1
    assert [loss is None for loss in losses(run).values()] == [False, True, False], "and not 0, as Trainer has it"
    assert "rows.jsonl:" in told[0]


def weights_of_step(run: Path, step: int) -> dict[str, torch.Tensor] | None:
    folder = run / f"checkpoint-{step}"
    return weights(folder) if folder.is_dir() else None


def test_losses_that_stay_no_numbers_end_the_run(sft_args: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, set(range(100)))
    with pytest.raises(MMToolError, match="the loss is not a finite number at step 5 in 5 steps in a row"):
        sft_main(sft_args(max_steps=9))


@pytest.fixture
def with_gap(data_file: Path, tmp_path: Path) -> Path:
    """The rows, one of them with a picture that is not there."""
    rows = [json.loads(line) for line in data_file.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["images"] = [str(data_file.parent / image) for image in row.get("images", [])]
    rows[3]["images"] = [str(tmp_path / "gone.png")]
    path = tmp_path / "gap.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_picture_that_is_gone_in_mid_epoch_is_left_out(
    sft_args: Make, with_gap: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sft_main(sft_args(dataset=[str(with_gap)], check_dataset="off", batch_size=9))
    assert any("gap.jsonl:4" in record.getMessage() for record in caplog.records)


def test_or_it_ends_the_run_with_a_checkpoint(sft_args: Make, with_gap: Path, tmp_path: Path) -> None:
    options = {"dataset": [str(with_gap)], "check_dataset": "off", "batch_size": 9, "on_row_error": "stop"}
    with pytest.raises(DataError, match=r"gap\.jsonl:4"):
        sft_main(sft_args(**options, max_steps=5))
    assert len(checkpoint_steps(tmp_path / "run")) == 1


def test_a_dead_data_process_ends_the_run_with_a_checkpoint(
    sft_args: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, asked = EncodedRows.__getitem__, []

    def die(self: EncodedRows, index: int) -> dict[str, Any]:
        asked.append(index)
        if len(asked) > 8:
            os._exit(9)
        return get(self, index)

    monkeypatch.setattr(EncodedRows, "__getitem__", die)
    with pytest.raises(MMToolError, match="a process that loads data has died"):
        sft_main(sft_args(max_steps=9, dataloader_num_workers=1))
    assert checkpoint_steps(tmp_path / "run")  # of the last step that was done, and maybe of one before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"resume_from_checkpoint": "last"}, "no checkpoint in"),
        ({"deepspeed": "default-zero4"}, "neither one of ours nor a file"),
        ({"fsdp": "full_shard"}, "--fsdp full_shard needs several processes"),
        ({"training_args": ["adam_beta3=0.9"]}, "has no such field"),
        ({"training_args": ["lr_scheduler_kwargs=7", "optim=best"]}, "transformers refuses"),
        ({"training_args": ["per_device_train_batch_size=4"]}, "there is an option of its own"),
        ({"training_args": ["bf16=true"]}, "there is an option of its own"),
        ({"training_args": ["load_best_model_at_end=true"]}, "has no effect"),
        ({"lr_scheduler_type": "cosin"}, "--lr_scheduler_type cosin: there is no such schedule"),
        ({"tune_audio_encoder": "true"}, "this model has no such part"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(sft_args: Make, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(MMToolError, match=said):
        sft_main(sft_args(**changed))
