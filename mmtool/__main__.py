"""Run the command line as ``python -m mmtool``."""

import sys

from mmtool.cli import main

if __name__ == "__main__":  # processes that vLLM or torch start read this file as well
    sys.exit(main())
