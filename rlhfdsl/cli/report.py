"""`rlhf report`: one HTML page of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlhfdsl.cli.common import OK, say
from rlhfdsl.language.files import write_whole

HELP = "one HTML page of a run: curves, evaluation, sample answers"


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rlhf report`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder (runs/NAME), finished or not")
    parser.add_argument(
        "-o", dest="output", type=Path, metavar="FILE", help="where to write the page (default: report.html in the run)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    from rlhfdsl.planning.figures import size
    from rlhfdsl.running import report

    page = report.page(report.read(args.run)).encode()
    path = args.output or args.run / "report.html"
    write_whole(path, page)
    say(f"{path}  {size(len(page))}")
    return OK
