"""Run the command line as ``python -m mmtool``."""

import sys

from mmtool.cli import main

sys.exit(main())
