"""Start the server, or say which package is missing for it; nothing heavy is imported before that is known."""

from __future__ import annotations

from importlib.util import find_spec

from mmtool import log
from mmtool.args import ServeArgs
from mmtool.errors import MMToolError
from mmtool.utils import collection_paused

PACKAGES = ("fastapi", "uvicorn", "httptools", "llguidance")


def start(args: ServeArgs) -> None:
    """Serve until told to stop.

    Raises:
        MMToolError: where the packages of the extra ``serve`` are not installed.
    """
    for package in PACKAGES:
        if find_spec(package) is None:
            raise MMToolError(f"`mmtool serve` needs the package {package}", "pip install 'mmtool[serve]'")
    with log.timed("import"), collection_paused(freeze=True):
        from mmtool.serve.main import serve_main

    serve_main(args)
