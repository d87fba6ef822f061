"""Run a list of trainings in this process, one after the other; started once per rank by the tests.

Usage: python two_ranks.py SCENARIOS.json, with RANK, LOCAL_RANK and WORLD_SIZE in the environment for several ranks.
A scenario is a list: MASTER_PORT, then the words of `mmtool sft`. Imports take longer than the trainings.
"""

import faulthandler
import json
import os
import signal
import sys
import time
import warnings

from mmtool.args import SftArgs
from mmtool.options import read_args


def main() -> None:
    warnings.simplefilter("ignore")
    faulthandler.register(signal.SIGUSR1)  # kill -USR1 tells where a process hangs
    from mmtool import log
    from mmtool.sft.launch import ending_with_its_own_code
    from mmtool.sft.main import sft_main

    log.setup("info" if os.environ.get("RANK", "0") == "0" else "error")
    with open(sys.argv[1], encoding="utf-8") as file:
        scenarios = json.load(file)
    for port, *words in scenarios:
        os.environ["MASTER_PORT"] = str(port)
        started = time.perf_counter()
        with ending_with_its_own_code():
            sft_main(read_args(SftArgs, words, "mmtool sft"))
        print(f"rank {os.environ.get('RANK', '0')}: {' '.join(words[-4:])}: {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
