"""`rlhf lsp`: the language server for editors."""

from __future__ import annotations

import argparse
import importlib.util

from rlhfdsl.cli.common import OK, fail

HELP = "the language server, for an editor to start"


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rlhf lsp`; editors add --stdio by themselves."""
    parser.add_argument("--stdio", action="store_true", help="speak on stdin and stdout, as it always does")


def run(args: argparse.Namespace) -> int:
    """Serve until the editor ends it."""
    if importlib.util.find_spec("pygls") is None:
        fail("the language server needs pygls: pip install 'rlhfdsl[lsp]'")
    from rlhfdsl.lsp.server import server

    server.start_io()
    return OK
