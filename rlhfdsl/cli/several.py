"""One recipe planned several times: over GPUs (`rlhf plan --gpus 1,2,4,8`), over models (`rlhf plan --largest opt`)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict

from rlhfdsl.cli.common import ERROR, OK, fail, load_recipe
from rlhfdsl.cli.planned import make_plan, positive
from rlhfdsl.language.suggest import listed, nearest
from rlhfdsl.planning import hardware, scaling
from rlhfdsl.planning.scaling import Point


def counts(text: str) -> list[int]:
    """`8`, or `1,2,4,8`."""
    return [positive(part) for part in text.split(",")]


def over_gpus(args: argparse.Namespace, gpus: list[int]) -> int:
    """The scaling curve, with the facts that the lock has; 1 when no count can be planned."""
    load_recipe(args.file, args)  # what is wrong with it is told once, in its place
    points = [_point(args, str(count), gpus=count) for count in dict.fromkeys(gpus)]
    return _said(args, points, scaling.curve)


def over_models(args: argparse.Namespace) -> int:
    """The models of a family in place of the actor, small to large; 1 when none fits."""
    recipe = load_recipe(args.file, args)
    address = scaling.actor_of(recipe)
    written = recipe.blocks[address]["from"]
    if written is None:
        fail(f"`{address}` is made from scratch; --largest sets the models of a family in place of a `from`")
    name = args.largest
    if name in ("actor", address):
        if written.kind != "hub":
            fail(f"`{address}` has no hub id; name a family: {', '.join(scaling.families())}")
        name = written.text
    hubs = scaling.family(name)
    if not hubs:
        near = nearest(name.lower(), scaling.families())
        help = f"did you mean {listed(near)}?" if near else f"families: {', '.join(scaling.families())}"
        fail(f"the catalog has no family `{name}`; {help}")
    points = [_point(args, hub, sets=[*args.sets, f"{address}.from={hub}"]) for hub in hubs]
    return _said(args, points, scaling.sizes)


def _point(args: argparse.Namespace, name: str, **changed: object) -> Point:
    options = argparse.Namespace(**(vars(args) | changed))
    planned = make_plan(options, use_lock=not args.no_lock, make_facts=False, fit=args.fit)
    return scaling.point(name, planned.plan, planned.diagnostics, planned.target or hardware.CPU)


def _said(args: argparse.Namespace, points: list[Point], text: Callable[[list[Point]], str]) -> int:
    if args.format == "json":
        print(json.dumps({"format_version": "1.0", "plans": [asdict(point) for point in points]}, indent=1))
    else:
        sys.stdout.write(text(points))
        print("Estimates. Nothing was run or changed.")
    return OK if any(point.error is None for point in points) else ERROR
