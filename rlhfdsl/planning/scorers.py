"""What scores the answers of a stage: reward models, functions of Python files, endpoints; each with its weight.

A file is pinned by its hash and read as text: that it is Python and defines the function is seen from its syntax tree.
Nothing here runs it, and nothing here asks an endpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.language.recipe import Block, Recipe, Reference
from rlhfdsl.planning.lock import key_of, pin

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """One term of a stage's score. `model` is the reward model of a term that has one, named in the block at `at`."""

    entry: Json
    model: Reference | None
    at: str


def of(recipe: Recipe, stage: Block, lock: Mapping[str, Any]) -> list[Source]:
    """The terms of a stage's score: its `model` or `call` first, with weight 1, then what it adds."""
    reward = stage.blocks["reward"]
    found = []
    if reward["model"] is not None:
        entry = {"name": "model", "weight": 1.0, "kind": "model", "engine": "reward"}
        found.append(Source(entry, reward["model"], f"{stage.address}.reward"))
    else:
        found.append(_scorer(recipe.blocks[reward["call"].address], 1.0, "reward", lock))
    added = reward.blocks.get("add")
    for name, setting in added.settings.items() if added is not None else ():
        block = recipe.blocks[f"scorer.{name}"]
        found.append(_scorer(block, float(setting.value), f"reward-{name.replace('.', '-')}", lock))
    return found


def _scorer(block: Block, weight: float, engine: str, lock: Mapping[str, Any]) -> Source:
    entry: Json = {"name": block.address.removeprefix("scorer."), "weight": weight}
    if block["model"] is not None:
        return Source(entry | {"kind": "model", "engine": engine}, block["model"], block.address)
    if block["url"] is not None:
        entry |= {"kind": "endpoint", "url": block["url"], "timeout": block["timeout"]}
        return Source(entry, None, block.address)
    code = {"file": block["file"].path, "function": block["function"]}
    key = key_of(code)
    facts = lock.get("scorers", {}).get(key)
    return Source(entry | {"kind": "function"} | code | {"key": key, "facts": facts}, None, block.address)


def facts(entry: Json, base: Path, address: str) -> Json:
    """The facts of a function's file: its pin. Raises UserError when it cannot be read or lacks the function."""
    import ast  # no plan without a function needs it

    path = base / entry["file"]
    try:
        pinned = pin(path)
        tree = ast.parse(path.read_bytes(), filename=entry["file"])
    except OSError as error:
        raise UserError(
            "E0740", f"`{entry['file']}` cannot be read: {error.strerror}", at=f"{address}.file", place=str(path),
            help="`file` is a path from the recipe's folder",
        ) from error  # fmt: skip
    except (SyntaxError, ValueError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        message = f"`{entry['file']}` is not valid Python{where}: {getattr(error, 'msg', error)}"
        raise UserError("E0740", message, at=f"{address}.file", place=str(path)) from error
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    function = next((node for node in defined if node.name == entry["function"]), None)
    if function is None:
        names = ", ".join(node.name for node in defined if not node.name.startswith("_")) or "none"
        raise UserError(
            "E0741", f"`{entry['file']}` defines no function `{entry['function']}`", at=f"{address}.function",
            place=str(path), help=f"functions at its top: {names}",
        )  # fmt: skip
    taken = function.args
    needed = len(taken.posonlyargs) + len(taken.args) - len(taken.defaults)
    if needed > 2 or (len(taken.posonlyargs) + len(taken.args) < 2 and taken.vararg is None):
        raise UserError(
            "E0741", f"`{entry['function']}` of `{entry['file']}` does not take two lists", at=f"{address}.function",
            place=str(path), help=f"def {entry['function']}(prompts: list[str], answers: list[str]) -> list[float]",
        )  # fmt: skip
    return {"files": {entry["file"]: pinned}}
