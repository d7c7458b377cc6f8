"""Where a plan writes: moved to another folder, and held to the working directory when a stranger wrote the recipe."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.language.terminal import visible as shown
from rlhfdsl.planning.lock import scorers

Json = dict[str, Any]


def relocate(plan: Json, output: str) -> Json:
    """The same plan with its outputs under the folder `output`."""
    confined(plan, any_output=True)
    old = plan["recipe"]["output"]

    def moved(path: str) -> str:
        return output + path.removeprefix(old)

    stages = [
        {
            **stage, "output": moved(stage["output"]),
            "artifacts": {name: moved(path) for name, path in stage["artifacts"].items()},
            "writes": [{**entry, "path": moved(entry["path"])} for entry in stage["writes"]],
        }
        for stage in plan["stages"]
    ]  # fmt: skip
    return {**plan, "recipe": {**plan["recipe"], "output": output}, "stages": stages}


def make_output(output: Path) -> Path:
    """The run's folder, made if it is not there. Raises UserError where a file is in its way."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next((path for path in (output, *output.parents) if path.is_file()), output)
        raise UserError(
            "E0797", f"the run would write to the folder `{shown(str(output))}`, and `{shown(str(file))}` is a file",
            at="recipe.output", help="name another folder, here or with `--output FOLDER`",
        ) from error  # fmt: skip
    return output


def confined(plan: Json, *, any_output: bool = False) -> None:
    """Raise UserError when a plan writes outside the working directory, or a stage outside the run's folder.

    any_output: whoever runs it chose the run's folder, so it may lie anywhere.
    """
    output = plan["recipe"]["output"]
    if not any_output and not _inside(output):
        raise UserError(
            "E0754", f"the run would write to `{shown(output)}`, outside the working directory",
            at="recipe.output",
            help="if that is meant, choose the folder where you run it: --output FOLDER",
        )  # fmt: skip
    for stage in plan["stages"]:
        for path in _logs(stage):
            if not _inside(path):
                raise UserError(
                    "E0754", f"DeepSpeed would write to `{shown(path)}`, outside the working directory",
                    at=f"{stage['address']}.deepspeed", help="name a path below the working directory",
                )  # fmt: skip
        inner = [(stage["output"], output), *((path, stage["output"]) for path in stage["artifacts"].values())]
        for path, folder in inner:
            name = path.removeprefix(folder + "/")
            if name == path or "/" in name or not _inside(name):
                raise UserError(
                    "E0754", f"{stage['address']} would write to `{shown(path)}`, outside its run",
                    help="the plan was not made by rlhf; do not run it",
                )  # fmt: skip


def no_strange_code(plan: Json, name: str, *, bundle: bool) -> None:
    """Raise UserError for a Python function that a stranger's file names where the one who runs it did not put it.

    A bundle has none; a saved plan has its files beside it, where their hashes are compared before they run.
    """
    for _, source in scorers(plan):
        path = source["file"]
        if bundle or not _inside(path):
            why = "a bundle holds no code" if bundle else "the code of a saved plan lies beside it"
            raise UserError("E0750", f"`{name}` would run `{shown(path)}`, and {why}", place=name,
                            help="do not use it; whoever made it did not use rlhf")  # fmt: skip


def _logs(stage: Json) -> Iterator[str]:
    """Where the monitors and the profiler of DeepSpeed that a recipe asks for write."""
    for engine in stage["engines"].values():
        for part in engine["deepspeed"].values():
            if isinstance(part, dict):
                yield from (part[key] for key in ("output_path", "output_file", "job_name") if part.get(key))


def _inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and not os.path.isabs(path) and ".." not in parts and "\\" not in path and ":" not in path
