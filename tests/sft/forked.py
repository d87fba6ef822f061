"""Run commands of `mmtool sft`, each in a process of its own that need not import anything; started by the tests.

Usage: python forked.py COMMANDS.json. A command is a list of words. Prints the exit code of each; what it says on
stderr is in NUMBER.log beside the file.
"""

import importlib.util
import json
import os
import sys
import warnings
from pathlib import Path

from mmtool.cli import main as mmtool
from mmtool.sft import main as _loaded  # noqa: F401

if importlib.util.find_spec("deepspeed") is not None:
    import deepspeed  # noqa: F401


def main() -> None:
    warnings.simplefilter("ignore")
    file = Path(sys.argv[1])
    for number, words in enumerate(json.loads(file.read_text(encoding="utf-8"))):
        child = os.fork()
        if child == 0:
            os.dup2(os.open(file.with_name(f"{number}.log"), os.O_WRONLY | os.O_CREAT), 2)
            code = mmtool(words)
            sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
