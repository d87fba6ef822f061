"""One command, several processes: `--nproc_per_node` starts them under torchrun; and what a process must know then."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmtool import log
from mmtool.args import SftArgs
from mmtool.errors import MMToolError
from mmtool.options import ENV_PREFIX, options_of
from mmtool.sft.places import with_saved_options
from mmtool.utils import collection_paused, free_port

SAVING_TIME = "600"  # seconds that processes get to save after Ctrl-C before torchrun kills them


def start(args: SftArgs) -> None:
    """Train in this process, or in as many as asked for.

    Raises:
        SystemExit: with the exit code of the processes, where they fail.
    """
    args = with_saved_options(args)
    if wants_processes(args):
        code = run_processes(args)
        if code:
            raise SystemExit(code)
        return
    with ending_with_its_own_code() if "LOCAL_RANK" in os.environ else nullcontext():
        with log.timed("import"), collection_paused(freeze=True):
            from mmtool.sft.main import sft_main

        sft_main(args)


@contextmanager
def ending_with_its_own_code() -> Iterator[None]:
    """Make a process that has talked with others end with the exit code of the block, whatever its threads are doing.

    The threads of gloo outlive their group where DDP or DeepSpeed keeps it. One may still be at letting go of the
    tensor of the last exchange, for which it needs the interpreter; if that is ending by then, the thread is ended in
    the middle of C++ code, and that aborts the process: "terminate called without an active exception". So the process
    ends here, before the interpreter does. What was registered later, such as by torch, has run by then.
    """
    code = 0

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)
    try:
        yield
    except BaseException as error:
        code = _exit_code(error)
        raise


def _exit_code(error: BaseException) -> int:
    """Return what the command line makes of an error."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 2 if isinstance(error, MMToolError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def wants_processes(args: SftArgs) -> bool:
    """Tell whether this process is the one that starts others."""
    nodes = _number("NNODES", 1)
    return "LOCAL_RANK" not in os.environ and (processes_per_node(args) > 1 or nodes > 1)


def processes_per_node(args: SftArgs) -> int:
    """Return how many processes this machine runs."""
    return args.devices.nproc_per_node or _number("NPROC_PER_NODE", 1)


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    try:
        return int(text)
    except ValueError:
        raise MMToolError(f"{variable}={text!r} is not a number", f"Unset it, or set it to {default}.") from None


def run_processes(args: SftArgs) -> int:
    """Run this command in several processes under torchrun and return the exit code.

    More machines come in through the usual variables: NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT.
    """
    num_processes, nodes = processes_per_node(args), _number("NNODES", 1)
    if nodes > 1 and not os.environ.get("MASTER_ADDR"):
        raise MMToolError(
            "NNODES is above 1, but MASTER_ADDR is not set", "Set it to the address of the first machine."
        )
    with tempfile.TemporaryDirectory(prefix="mmtool-") as folder:
        config = Path(folder) / "sft.yaml"
        config.write_text(as_yaml(args), encoding="utf-8")
        agent = [sys.executable, "-c", "from mmtool.sft.launch import run_agent; run_agent()"]
        torchrun = [
            f"--nproc_per_node={num_processes}",
            f"--nnodes={nodes}",
            f"--node_rank={_number('NODE_RANK', 0)}",
            f"--master_addr={os.environ.get('MASTER_ADDR', '127.0.0.1')}",
            f"--master_port={os.environ.get('MASTER_PORT') or free_port()}",
        ]
        command = [*agent, *torchrun, "-m", "mmtool", "sft", "--config", str(config)]
        # A session of its own: Ctrl-C reaches the processes once, through here, and they save before they end.
        child = subprocess.Popen(command, env=_environment(num_processes), start_new_session=True)
        return _wait(child)


def _wait(child: subprocess.Popen[bytes]) -> int:
    def forward(number: int, _: Any) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_agent() -> None:
    """Be torchrun, without its report of a failure: the process that failed has said what was wrong."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in list(logging.root.manager.loggerDict):  # each has a level of its own
        if name.startswith(("torch.distributed.elastic", "torch.distributed.run")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run.main(sys.argv[1:])
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        sys.exit(next((code for code in codes if code > 0), 1))
    except SignalException:
        sys.exit(130)


def as_yaml(args: SftArgs) -> str:
    """Return the options that differ from their defaults or were given, as a file for ``--config``."""
    import yaml

    groups = asdict(args)
    values = {}
    for option in options_of(SftArgs):
        value = groups[option.group][option.name] if option.group else groups[option.name]
        if value is not None and (option.name in args.explicit or value != option.default):
            values[option.name] = value
    return yaml.safe_dump(values, allow_unicode=True, sort_keys=False)


def _environment(num_processes: int) -> Mapping[str, str]:
    # The options are all in the file; left in the environment they would come before it.
    kept = {name: text for name, text in os.environ.items() if not _is_option(name)}
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    return {"OMP_NUM_THREADS": str(threads), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SAVING_TIME, **kept}


def _is_option(variable: str) -> bool:
    name = variable.removeprefix(ENV_PREFIX).lower()
    return variable.startswith(ENV_PREFIX) and any(option.name == name for option in options_of(SftArgs))
