"""Plans and locks against their schemas in grammar/, and plans against themselves, when one is written or is read to be
run: a plan in JSON can be edited by hand.

jsonschema is imported here and only when called: planning itself does without.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.language.resources import resource
from rlhfdsl.planning.batches import proves
from rlhfdsl.planning.compile import FORMAT_VERSION

_ANEW = {"plan": "plan the recipe again", "lock": "delete it: the next plan makes it anew"}


def validate_plan(plan: dict[str, Any]) -> None:
    """Raises UserError when `plan` is of another format, not of its schema, or says two things at once; the message
    names the place."""
    found = plan.get("format_version")
    if found != FORMAT_VERSION:
        raise UserError(
            "E0720",
            f"the plan has format {found}, and this program reads {FORMAT_VERSION}",
            help=_ANEW["plan"],
        )
    _validate(plan, "plan.schema.json", "plan")
    for place, why in _contradictions(plan):
        raise UserError("E0720", f"the plan is not valid at `{place}`: {why}", help=_ANEW["plan"])


def _contradictions(plan: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(place, why) of batches that are not the sum of their micro batches, and of names that nothing has."""
    world, sources = plan["target"]["world"], {**plan["data"], **plan["blends"]}
    for address, blend in plan["blends"].items():
        for name in {name for mix in blend["mix"].values() for name in mix} - plan["data"].keys():
            yield f"blends.{address}.mix", f"there is no `{name}` in `data`"
    made: dict[str, dict[str, str]] = {}
    for number, stage in enumerate(plan["stages"]):
        at, batch = f"stages[{number}]", stage["batch"]
        whole = batch["minibatch" if "rollouts" in batch else "batch"]
        for name, engine in stage["engines"].items():
            micro, accumulation, weights = engine["micro"], engine["accumulation"], engine["weights"]
            if engine["trains"] and not proves(whole, world, micro, accumulation):
                why = f"{world} x micro {micro} x accumulation {accumulation} is not the batch of {whole}"
                yield f"{at}.engines.{name}", why
            if engine["zero"] == 3 and "base" in (engine["lora"] or {}):
                yield f"{at}.engines.{name}", "stage 3 does not partition a base in 4 bits"
            known = made.get(weights["stage"], {}) if "stage" in weights else plan["models"]
            wanted = weights["artifact"] if "stage" in weights else weights["model"]
            if wanted not in known:
                whose = f"in a {weights['stage']} before it" if "stage" in weights else "in `models`"
                yield f"{at}.engines.{name}.weights", f"there is no `{wanted}` {whose}"
        for name, edge in stage["edges"].items():
            if edge is not None and edge["source"] not in sources:
                yield f"{at}.edges.{name}", f"there is no `{edge['source']}` in `data` or `blends`"
            if edge is not None and edge["model"] not in plan["models"]:
                yield f"{at}.edges.{name}", f"there is no `{edge['model']}` in `models`"
        made[stage["address"]] = stage["artifacts"]


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
