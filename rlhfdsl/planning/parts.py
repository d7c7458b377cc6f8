"""One part of a plan by its path: `stage.ppo.memory`, `stage.ppo.engines.actor`, `time`, `ds_config.actor`."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]
CONFIG = "ds_config"


def part(plan: Json, path: str) -> Any:
    """What stands at a path. Raises KeyError with the names that there are where the path leaves the plan.

    A stage is named by its address; `ds_config.NAME` is an engine's DeepSpeed configuration: by its name (`actor`),
    its stage where that has one only (`sft`), or both (`ppo.actor`).
    """
    if path == CONFIG or path.startswith(CONFIG + "."):
        return _config(plan, path.removeprefix(CONFIG).removeprefix("."))
    for stage in plan["stages"]:
        if path == stage["address"] or path.startswith(stage["address"] + "."):
            return _inside(stage, path.removeprefix(stage["address"]).removeprefix("."))
    addresses = [stage["address"] for stage in plan["stages"]]
    names = [name for name in plan if name != "stages"]
    first = path.partition(".")[0]
    if first not in names:
        raise KeyError([*addresses, CONFIG, *names])
    return _inside(plan, path)


def _config(plan: Json, name: str) -> Json:
    known: dict[str, Json] = {}
    for stage in plan["stages"]:
        short = stage["address"].removeprefix("stage.")
        engines = {key: engine["deepspeed"] for key, engine in stage["engines"].items() if engine["deepspeed"]}
        if len(engines) == 1:
            known.setdefault(short, next(iter(engines.values())))
        for key, config in engines.items():
            known.setdefault(key, config)
            known[f"{short}.{key}"] = config
    if name not in known:
        raise KeyError([f"{CONFIG}.{known_name}" for known_name in known])
    return known[name]


def _inside(value: Any, path: str) -> Any:
    """What a dotted path leads to; a key may have dots in it (`models.model.base`)."""
    while path:
        names = list(value) if isinstance(value, dict) else []
        found = [name for name in names if path == name or path.startswith(name + ".")]
        if not found:
            raise KeyError(names)
        name = max(found, key=len)
        value, path = value[name], path.removeprefix(name).removeprefix(".")
    return value
