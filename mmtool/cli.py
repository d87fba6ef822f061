"""The commands. Each body is one import and one call; ``main`` is the only place that turns errors into text."""

import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer
from typer.core import TyperGroup

from mmtool import __version__, log, other_names
from mmtool.args import ExportArgs, InferArgs, ListArgs, ServeArgs, SftArgs
from mmtool.errors import MMToolError
from mmtool.options import HELP_NAMES, TRUE, command
from mmtool.utils import collection_paused, did_you_mean

_TOP_OPTIONS = ("--help", "-h", "--version", "--install-completion", "--show-completion")


class _Commands(TyperGroup):
    """The group ``mmtool``: a command word goes straight to its command, without parsing the options of the group."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing or not args or args[0] in _TOP_OPTIONS:
            return super().parse_args(ctx, args)
        if args[0].startswith("-"):
            hint = did_you_mean(args[0], _TOP_OPTIONS[:3], "Options come after the command: mmtool infer --name value.")
            raise MMToolError(f"unknown option {args[0]}", hint)
        if args[0] not in self.commands:
            hint = other_names.COMMANDS.get(args[0].replace("_", "-"))
            listed = "`mmtool --help` lists the commands."
            raise MMToolError(f"unknown command {args[0]!r}", hint or did_you_mean(args[0], self.commands, listed))
        ctx.args = args
        return args

    def invoke(self, ctx: typer.Context) -> None:
        word, *rest = ctx.args
        chosen = self.commands[word]
        with chosen.make_context(word, rest, parent=ctx) as inner:
            chosen.invoke(inner)


app = typer.Typer(cls=_Commands, pretty_exceptions_enable=False, context_settings=HELP_NAMES)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"mmtool {__version__}")
        raise typer.Exit


@app.callback()
def _mmtool(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Chat with, fine-tune, export and serve multimodal models; a small one comes with the package."""


@contextmanager
def _leave_on_interrupt() -> Iterator[None]:
    """End the process at once at Ctrl-C: an import cut in two raises all kinds of errors, some of them much later."""
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@command(app)
def infer(args: InferArgs) -> None:
    """Chat with a model, ask it one question, or answer every row of a dataset."""
    log.setup(args.log.log_level, verbose=args.log.verbose)
    with log.timed("import"), collection_paused(freeze=True), _leave_on_interrupt():
        from mmtool.infer.main import infer_main

    infer_main(args)


@command(app)
def sft(args: SftArgs) -> None:
    """Fine-tune a model on your own data."""
    log.setup(args.log.log_level, verbose=args.log.verbose)
    from mmtool.sft.launch import start

    start(args)


@command(app)
def export(args: ExportArgs) -> None:
    """Merge adapters, convert, quantise, publish."""
    log.setup(args.log.log_level, verbose=args.log.verbose)
    from mmtool.export.main import export_main

    export_main(args)


@command(app)
def serve(args: ServeArgs) -> None:
    """Answer over HTTP, with OpenAI's interface."""
    log.setup(args.log.log_level, verbose=args.log.verbose)
    from mmtool.serve.launch import start

    start(args)


@command(app)
def list_(args: ListArgs) -> None:
    """List what can be named: models, templates, datasets."""
    from mmtool.listing import print_table

    print_table(args.table, as_json=args.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for what the user can fix, 130 after Ctrl-C."""
    words = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    try:
        code = app(words, prog_name="mmtool", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except MMToolError as error:
        return _report(error)
    except typer.TyperException as error:
        return _report(MMToolError(error.format_message(), "`mmtool --help` lists the commands."))
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # The reader of stdout went away; without this the interpreter complains when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _report(error: MMToolError) -> int:
    if os.environ.get("MMTOOL_DEBUG", "").lower() in TRUE:
        traceback.print_exc()
    for name, text in (("error", error.message), ("hint", error.hint)):
        if text:
            print(f"{name}: {' '.join(text.splitlines())}", file=sys.stderr)
    return 2
