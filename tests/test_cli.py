"""The command line from the outside: help, exit codes, the error border."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mmtool import __version__, cli
from mmtool.args import COMMANDS, InferArgs
from mmtool.errors import MMToolError
from mmtool.options import options_of
from mmtool.registry import MODELS

HEAVY = ("torch", "transformers", "numpy", "PIL", "pydantic", "requests", "huggingface_hub")


def run(*words: str, env: dict[str, str] | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "mmtool", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | (env or {}), **more)


@pytest.fixture
def infer_main(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the command body call a function of the test instead of the real one."""

    def replace(body: Any) -> None:
        module = ModuleType("mmtool.infer.main")
        module.infer_main = body  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "mmtool.infer.main", module)

    return replace


# Help


@pytest.mark.parametrize("words", [[], ["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    code = f"import sys; from mmtool import cli; code = cli.main({words!r}); "
    code += f"print(*(m for m in {HEAVY!r} if m in sys.modules)); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.splitlines()[-1], done.stderr) == (0, "", "")


def test_help_is_shown_for_the_module_the_group_and_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Usage: mmtool" in run().stdout
    assert cli.main(["-h"]) == 0
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert f" {command} " in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_command_help_shows_every_option_with_its_text(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    for option in options_of(COMMANDS[command]):
        assert option.positional or f" --{option.name} " in shown
        assert option.help[:60] in shown


def test_commands_and_argument_classes_belong_together() -> None:
    assert {registered.name for registered in cli.app.registered_commands} == set(COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mmtool {__version__}\n"


# Mistakes


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (["infr"], "unknown command 'infr'", "Did you mean infer?"),
        (["zzz"], "unknown command 'zzz'", "`mmtool --help` lists the commands."),
        (["merge-lora"], "unknown command 'merge-lora'", "Use mmtool export --ckpt_dir FOLDER --merge_lora true."),
        (["infer", "--lora_rank", "4"], "unknown option --lora_rank", "It is an option of mmtool sft."),
        (["infer", "--lora_dropout_p", "0"], "unknown option --lora_dropout_p", "It is an option of mmtool sft."),
        (["--verison"], "unknown option --verison", "Did you mean --version?"),
        (["--model_type", "tiny"], "unknown option --model_type", "mmtool infer --name value"),
        (["infer", "--modle_type", "x"], "unknown option --modle_type", "Did you mean --model_type?"),
        (["list", "modls"], "TABLE must be one of models, templates, datasets, not 'modls'", "Did you mean models?"),
    ],
)
def test_mistakes_are_two_lines_and_exit_code_2(
    words: list[str], error: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert out == ""
    assert first == f"error: {error}"
    assert second.startswith("hint: ")
    assert hint in second


def test_an_unknown_model_type_gets_a_suggestion() -> None:
    done = run("infer", "--model_type", "yi_vl_6b", "--query", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown model_type 'yi_vl_6b'\nhint: Did you mean yi-vl-6b-chat?\n"


def test_an_error_is_one_line_whatever_its_message_holds(infer_main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: InferArgs) -> None:
        raise MMToolError("first\nsecond")

    infer_main(fail)
    assert cli.main(["infer"]) == 2
    assert capsys.readouterr().err == "error: first second\n"


def test_debug_adds_the_traceback(
    infer_main: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: InferArgs) -> None:
        raise MMToolError("broken", "Mend it.")

    infer_main(fail)
    monkeypatch.setenv("MMTOOL_DEBUG", "1")
    assert cli.main(["infer"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: broken\nhint: Mend it.\n")


def test_a_bug_keeps_its_traceback(infer_main: Any) -> None:
    def fail(args: InferArgs) -> None:
        raise ZeroDivisionError

    infer_main(fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["infer"])


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt, 130), (BrokenPipeError, 1)])
def test_being_stopped_is_quiet(
    infer_main: Any, capfd: pytest.CaptureFixture[str], raised: type[BaseException], code: int
) -> None:
    def stop(args: InferArgs) -> None:
        raise raised

    infer_main(stop)
    saved = os.dup(1)
    try:
        assert cli.main(["infer"]) == code
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    assert capfd.readouterr().err == ""


def test_ctrl_c_ends_the_process_with_130() -> None:
    code = (
        "import sys, types, time; m = types.ModuleType('mmtool.infer.main'); sys.modules[m.__name__] = m\n"
        "def infer_main(args):\n    print('started', flush=True)\n    time.sleep(30)\n"
        "m.infer_main = infer_main; from mmtool.cli import main; sys.exit(main(['infer']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "")


def test_a_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        command = [sys.executable, "-m", "mmtool", "list", "models", "--json"]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")


# What reaches the body


def test_the_body_gets_the_arguments(infer_main: Any) -> None:
    seen: list[InferArgs] = []
    infer_main(seen.append)
    assert cli.main(["infer", "--query", "how many?", "--images", "a.png", "--stream", "false"]) == 0
    (args,) = seen
    assert (args.input.query, args.input.images, args.generation.stream) == ("how many?", ["a.png"], False)


# list


def test_list_prints_one_line_per_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "models"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "model_type"
    assert [row.split()[0] for row in rows] == list(MODELS)


@pytest.mark.parametrize(("table", "key"), [("models", "model_type"), ("templates", "template_type")])
def test_list_as_json(table: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", table, "--json", "true"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert "tiny" in [row[key] for row in rows]


def test_list_datasets_says_where_they_are_and_that_files_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "datasets"]) == 0
    out = capsys.readouterr().out
    assert "--val_dataset also take the path of any" in out
    assert "tiny-shapes     in the package" in out
    assert cli.main(["list", "datasets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["coco-en-mini"]["ms"] == "modelscope/coco_2014_caption"


def test_the_console_script_is_there() -> None:
    script = Path(sys.executable).with_name("mmtool")
    if not script.exists():
        pytest.skip("mmtool is not installed in this environment, only importable")
    assert subprocess.run([script, "--version"], capture_output=True, text=True).stdout == f"mmtool {__version__}\n"


def test_import_mmtool_alone_is_light() -> None:
    code = f"import sys, mmtool; print(*(m for m in {(*HEAVY, 'typer', 'rich')!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("\n", "")
