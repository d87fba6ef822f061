"""`mmtool infer` as a whole: what is checked before the weights load, and one question."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

import mmtool
from mmtool.args import InferArgs
from mmtool.errors import MMToolError
from mmtool.groups.infer import InputArgs
from mmtool.groups.model import ModelArgs
from mmtool.groups.prompt import GenerationArgs, TemplateArgs
from mmtool.infer import main
from mmtool.infer.main import infer_main, read_sampling

TINY = Path(mmtool.__file__).parent / "models" / "tiny" / "checkpoint"
PICTURES = Path(mmtool.__file__).parents[1] / "examples" / "pictures"


@pytest.fixture
def ask(checkpoint, capsys):
    """Run `mmtool infer` in this process; returns what stdout and stderr say."""

    def run(query, *, stream=True, max_new_tokens=8, template=None, **given):
        args = InferArgs(
            model=ModelArgs(model_id_or_path=str(checkpoint)),
            generation=GenerationArgs(max_new_tokens=max_new_tokens, stream=stream),
            template=template or TemplateArgs(),
            input=InputArgs(query=query, **given),
        )
        infer_main(args)
        return capsys.readouterr()

    return run


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, colour in zip(paths, ("red", "blue"), strict=True):
        PIL.Image.new("RGB", (60, 40), colour).save(path)
    return [str(path) for path in paths]


@pytest.fixture
def no_weights(monkeypatch):
    """Fail where the weights would load."""

    def load_model(*args, **kwargs):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(main, "open_engine", load_model)


def expected(model, content):
    request = model.request([{"role": "user", "content": content}])
    return "".join(model.template.decode(model.engine.answer(request).token_ids[:8]))


def test_the_answer_is_all_of_stdout(ask, model, pictures):
    content = [{"type": "image", "image": path} for path in pictures] + [{"type": "text", "text": "one"}]
    out, err = ask("one", images=pictures)
    assert out == expected(model, content) + "\n"
    assert ask("one", images=pictures, stream=False).out == out
    assert "prompt" not in err


def test_the_question_may_come_from_stdin(ask, monkeypatch):
    written = ask("one\ntwo").out
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert ask("-").out == written


def test_json_is_one_line_about_the_answer(ask, model, pictures):
    content = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "one"}]
    out, _ = ask("one", images=pictures[:1], json=True)
    assert out.count("\n") == 1
    report = json.loads(out)
    timings = report.pop("timings")
    assert report == {
        "model_type": "yi-vl-6b-chat",
        "response": ask("one", images=pictures[:1]).out.rstrip("\n"),
        "finish_reason": "length",
        "prompt_tokens": len(model.request([{"role": "user", "content": content}]).input_ids),
        "completion_tokens": 8,
        "images": pictures[:1],
        "audios": [],
    }
    assert {"processor", "encode", "load", "first_token", "decode", "total"} <= timings.keys()
    assert all(seconds >= 0 for seconds in timings.values())


def test_the_prompt_can_be_shown_and_the_answer_stays_alone_on_stdout(ask):
    out, err = ask("one", template=TemplateArgs(show_prompt=True, system="Be brief."))
    assert "Be brief." in err
    assert "Human: one" in err
    assert out == ask("one", template=TemplateArgs(system="Be brief.")).out


def test_a_bad_picture_is_told_before_the_weights_load(ask, no_weights):
    with pytest.raises(MMToolError, match=r"missing\.png"):
        ask("one", images=["missing.png"])


def test_a_question_over_max_length_is_told_before_the_weights_load(ask, no_weights):
    with pytest.raises(MMToolError, match="max_length"):
        ask("one", template=TemplateArgs(max_length=20))


def test_a_question_longer_than_the_model_takes_is_told_before_the_weights_load(ask, no_weights):
    with pytest.raises(MMToolError, match="4096"):
        ask("a long question " * 2000)


def test_sounds_need_a_model_that_hears(ask, no_weights):
    with pytest.raises(MMToolError, match="--audios: yi-vl-6b-chat takes text and image only"):
        ask("one", audios=["a.wav"])


def test_settings_that_are_not_given_are_those_of_the_release(model):
    config = model.engine.model.generation_config
    assert read_sampling(GenerationArgs(), config).do_sample is False
    config = type(config)(do_sample=True, temperature=0.6, top_p=0.8, max_new_tokens=77)
    release = read_sampling(GenerationArgs(), config)
    assert (release.do_sample, release.temperature, release.top_p, release.max_new_tokens) == (True, 0.6, 0.8, 77)
    given = read_sampling(GenerationArgs(temperature=0.2, seed=3, stop_words=["!"]), config)
    assert (given.temperature, given.top_p, given.seed, given.stop) == (0.2, 0.8, 3, ("!",))
    assert read_sampling(GenerationArgs(temperature=0), config).greedy


@pytest.mark.skipif(not (TINY / "config.json").exists(), reason="the embedded model is not there")
def test_without_any_option_the_embedded_model_chats_about_a_picture(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"What colour is the circle?\n{PICTURES / 'circle.png'}\n"))
    infer_main(InferArgs())
    answer, rule = capsys.readouterr().out.splitlines()
    assert "red" in answer.lower()
    assert rule == "-" * 50
    query = InputArgs(query="What colour is the circle?", images=[str(PICTURES / "circle.png")])
    infer_main(InferArgs(input=query))
    assert capsys.readouterr().out == answer + "\n"


def test_a_real_run_keeps_stdout_and_stderr_apart(checkpoint, pictures, tmp_path):
    command = [sys.executable, "-m", "mmtool", "infer", "--model_id_or_path", checkpoint, "--max_new_tokens", "8"]
    env = os.environ | {"PYTHONPATH": str(Path(mmtool.__file__).parents[1])}
    lines = f"one\nmissing.png\n{pictures[0]}\nquit\n"
    run = subprocess.run(command, input=lines, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert run.returncode == 0
    answer, rule = run.stdout.splitlines()
    assert answer
    assert rule == "-" * 50
    (error,) = run.stderr.splitlines()
    assert error.startswith("error: cannot open image 'missing.png'")

    run = subprocess.run(
        [*command, "--query", "one", "--images", "missing.png"], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert [line.partition(":")[0] for line in run.stderr.splitlines()] == ["error", "hint"]
