"""Plans and locks against their schemas in grammar/, when one is written or is read to be run.

jsonschema is imported here and only when called: planning itself does without.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.language.resources import resource
from rlhfdsl.planning.compile import FORMAT_VERSION

_ANEW = {"plan": "plan the recipe again", "lock": "delete it: the next plan makes it anew"}


def validate_plan(plan: dict[str, Any]) -> None:
    """Raises UserError when `plan` is of another format or not of its schema; the message names the place."""
    found = plan.get("format_version")
    if found != FORMAT_VERSION:
        raise UserError(
            "E0720",
            f"the plan has format {found}, and this program reads {FORMAT_VERSION}",
            help=_ANEW["plan"],
        )
    _validate(plan, "plan.schema.json", "plan")


def validate_lock(lock: dict[str, Any]) -> None:
    """Raises UserError when `lock` is not of its schema."""
    _validate(lock, "lock.schema.json", "lock")


def _validate(value: dict[str, Any], schema: str, what: str) -> None:
    import jsonschema  # type: ignore[import-untyped]

    table = json.loads(resource("grammar", schema).read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(table)
    worst = jsonschema.exceptions.best_match(validator.iter_errors(value))
    if worst is None:
        return
    while worst.context:  # it is none of several forms: what it lacks of the nearest one
        branches = Counter(error.schema_path[0] for error in worst.context)
        nearest = min(branches, key=branches.__getitem__)
        worst = jsonschema.exceptions.best_match(e for e in worst.context if e.schema_path[0] == nearest)
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in worst.absolute_path)
    raise UserError(
        "E0720", f"the {what} is not valid at `{place.lstrip('.') or 'its top'}`: {worst.message[:300]}",
        help=_ANEW[what],
    )
