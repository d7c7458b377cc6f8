"""`rlhf bench rollout`: tokens a second of the rollout engines beside the floor that this device's memory sets."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from typing import Any

from rlhfdsl.cli.common import OK, fail, say
from rlhfdsl.cli.planned import positive
from rlhfdsl.language.files import write_whole
from rlhfdsl.planning import catalog, measured

TINY = {"type": "llama", "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "intermediate": 128, "vocab": 512,
        "context": 1024, "tied": True}  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments that only `rlhf bench rollout` has."""
    rollout = parser.add_argument_group("rollout")
    rollout.add_argument("--model", metavar="HUB_ID", help="a model of the catalog (default: facebook/opt-1.3b)")
    rollout.add_argument("--rows", type=positive, nargs="+", metavar="N", help="at once (default: 16 64 128 256)")
    rollout.add_argument("--prompt", type=positive, default=256, metavar="TOKENS", help="of each prompt (default: 256)")
    rollout.add_argument("--answer", type=positive, default=256, metavar="TOKENS", help="of each answer (default: 256)")
    rollout.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help="the actor's stage (default: 1; 0 on the CPU)")
    rollout.add_argument("--eager", action="store_true", help="measure `generate` too")


def run(args: argparse.Namespace, device: str, copy: float) -> int:
    """Measure and print. copy: bytes/s of the device's memory."""
    cuda = device == "cuda"
    arch: dict[str, Any] | None = TINY
    if args.model is not None or cuda:
        arch = catalog.lookup(args.model or "facebook/opt-1.3b")
    if arch is None:
        fail(f"`{args.model}` is not in the catalog")
    if args.prompt + args.answer > arch["context"]:
        fail(f"--prompt {args.prompt} and --answer {args.answer} exceed the {arch['context']} positions of the model")
    rows = args.rows or ([16, 64, 128, 256] if cuda else [4, 16])
    zero = args.zero if args.zero is not None else int(cuda)
    results = []
    os.environ["DS_ACCELERATOR"] = device  # before DeepSpeed is imported, which takes a GPU where there is one
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints and logs to stdout, which is the table's
        from rlhfdsl.running import decoding

        for found in decoding.measure(
            arch, device, copy, rows=rows, prompt=args.prompt, answer=args.answer, zero=zero, eager=args.eager
        ):
            say(f"   {found['engine']} {found['rows']}: {found['tokens_per_second']:.0f} tokens/s")
            results.append(found)
    text = json.dumps(results, indent=1) + "\n" if args.format == "json" else table(results, copy)
    print(text, end="")
    if args.output is not None:
        write_whole(args.output, text)
    return OK


def table(results: list[dict[str, Any]], copy: float) -> str:
    """The results in Markdown."""
    head = ("engine", "at once", "tokens/s", "answers/s", "seconds", "floor", "share", "first, more", "peak GiB")
    lines = [
        [
            row["engine"], str(row["rows"]), f"{row['tokens_per_second']:.0f}", f"{row['answers_per_second']:.1f}",
            f"{row['seconds']:.2f}", f"{row['floor']:.2f}" if "floor" in row else "-",
            f"{row['share']:.0%}" if "share" in row else "-", f"{row['first']:.1f} s",
            "-" if row["peak"] is None else f"{row['peak'] / 2**30:.1f}",
        ]
        for row in results
    ]  # fmt: skip
    return f"The floor reads weights and live cache once a step at {copy / 1e9:.0f} GB/s, measured here.\n\n" + (
        measured.markdown(head, lines)
    )
