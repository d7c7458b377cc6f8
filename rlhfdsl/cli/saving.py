"""Files that hold a plan: in JSON, or with recipe and lock (a saved plan, a bundle), read and verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhfdsl.cli.common import fail
from rlhfdsl.language import UserError
from rlhfdsl.planning import archive, saved
from rlhfdsl.planning.validate import validate_lock, validate_plan

Json = dict[str, Any]


def is_saved(path: Path) -> bool:
    """Whether a file is a saved plan or a bundle, by its name or its first bytes."""
    if path.suffix in (".rhplan", ".rlhfb"):
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError:
        return False


def read_saved(path: Path, *, valid: bool = True) -> saved.Saved:
    """A saved plan or bundle, its bytes verified and, if `valid`, its plan valid by the schema.

    Exits 2 when it cannot be read; raises UserError when it is none or was changed.
    """
    try:
        if path.stat().st_size > archive.LARGEST:
            raise archive.unusable(path.name, f"is larger than {archive.LARGEST >> 30} GiB")
        data = path.read_bytes()
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    held = saved.read(data, path.name)
    try:
        if valid:
            validate_plan(held.plan)
            validate_lock(held.locked)
    except UserError as error:
        raise saved.other(held, path.name, [error.message]) from error
    return held


def read_plan(path: Path) -> Json:
    """A saved plan, valid by its schema; of a printed one without the actions.

    Exits 2 when the file is no JSON object; raises UserError when it is another format's or not of the schema.
    """
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    except ValueError as error:
        fail(f"{path} is not a plan: {error}")
    if not isinstance(plan, dict):
        fail(f"{path} is not a plan: it holds no JSON object")
    validate_plan(plan)
    plan.pop("actions", None)  # what `plan --format json` knew of another moment
    return plan
