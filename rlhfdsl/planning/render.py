"""The text of a plan, made from its JSON and nothing else, so that what is printed is what runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhfdsl.planning import edges, figures
from rlhfdsl.planning.figures import LATER
from rlhfdsl.planning.lock import entries

Json = dict[str, Any]


def render(plan: Json, actions: Mapping[str, tuple[str, str]] | None = None) -> str:
    """A plan (of plan.schema.json) as plain text: header, stages, engines, batches, data, writes.

    actions: what a run would do with each stage now (run, rerun, resume, cached, refused) and why, by address.
    """
    stages = [_stage(plan, stage) for stage in plan["stages"]]
    parts = [_header(plan), _overview(plan, actions or {}), *stages, _closing(plan)]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def layout(plan: Json) -> str:
    """How the engines of a plan lie on the devices, as the `parallel` blocks of a recipe; equal ones come once."""
    blocks: dict[str, list[str]] = {}
    for stage in plan["stages"]:
        for name, engine in stage["engines"].items():
            if engine["shares"]:
                continue
            said = f"zero = {engine['zero']}, offload = {engine['offload']}"
            if engine["trains"]:
                said += f", gradient_checkpointing = {'on' if engine['gradient_checkpointing'] else 'off'}"
            said += f", micro = {engine['micro']}"
            if not engine["packing"]:
                said += ", packing = off"
            at = stage["address"] if len(stage["engines"]) == 1 else f"{stage['address']}.{name}"
            blocks.setdefault(said, []).append(at)
    lines = ["# This layout as a recipe; name the block in each engine, `parallel = parallel.pN`:"]
    for number, (said, users) in enumerate(blocks.items(), 1):
        lines.append(f"parallel p{number} {{ {said} }}  # {', '.join(users)}")
    return "\n".join(lines) + "\n"


def _header(plan: Json) -> list[str]:
    recipe, target = plan["recipe"], plan["target"]
    keys = {entry["key"]: entry["facts"] for _, _, entry in entries(plan)}
    known = sum(facts is not None for facts in keys.values())
    lock = f"{known} of {len(keys)} inputs known"
    if known == len(keys):
        lock = f"complete ({figures.count(known, 'input')})"
    origin = "detected" if target["origin"] == "detected" else f"by {target['origin']}"
    strict = "   deterministic" if recipe["determinism"] == "strict" else ""
    return [
        f"recipe  {recipe['name']}   seed {recipe['seed']}{strict}   lock {lock}",
        f"target  {devices(target)} ({origin})",
    ]


def devices(target: Json) -> str:
    """The devices of a plan's target: `1 node x 8 a100-80g, 80.0 GiB each`."""
    size = f"{figures.count(target['nodes'], 'node')} x {target['gpus']} {target['gpu'] or target['device']}"
    return size if target["memory"] is None else f"{size}, {figures.gib(target['memory'])} GiB each"


_SIGNS = {"run": "+", "rerun": "~", "resume": ">", "cached": "=", "refused": "!"}


def _overview(plan: Json, actions: Mapping[str, tuple[str, str]]) -> list[str]:
    rows, reasons = [], []
    for stage in plan["stages"]:
        batch = stage["batch"]
        if "rollouts" in batch:
            what = f"{figures.count(batch['rollouts'], 'rollout')} of {figures.count(batch['prompts'], 'prompt')}"
            what += f", {figures.count(batch['updates'], 'update')}"
        else:
            item = "sequence" if stage["kind"] == "sft" else "pair"
            what = f"{figures.count(batch['updates'], 'update')} of {figures.count(batch['batch'], item)}"
        time = stage["time"]
        about = "" if time is None or time["seconds"] is None else f"~ {figures.duration(time['seconds'])}"
        do, why = actions.get(stage["address"], ("run", ""))
        rows.append([f"  {_SIGNS[do]}", stage["address"], what, "from " + ", ".join(stage["needs"]), about])
        reasons.append([f"  {do}", stage["address"], why])
    if all(do == "run" for do, _ in actions.values()):
        return figures.table(rows)
    return [*figures.table(rows), "", *figures.table(reasons)]


def _closing(plan: Json) -> list[str]:
    """The whole in time and money, what that rests on, and that nothing has happened."""
    lines, time = [], plan["time"]
    if time is not None:
        about = LATER if time["seconds"] is None else f"~ {figures.duration(time['seconds'])}"
        devices = figures.count(plan["target"]["world"], "GPU" if plan["target"]["device"] == "cuda" else "process")
        cost = ""
        if time["cost"] is not None:
            digits = 0 if time["cost"] >= 100 else 2
            cost = f", ~ ${time['cost']:,.{digits}f} at ${time['price']:.2f} for a GPU and hour"
        lines.append(f"time    {about} on {devices}{cost} (estimate, not measured)")
        lines += [f"        {text}" for text in time["assumptions"]]
    elif plan["target"]["device"] == "cpu":
        lines.append("time    unknown; `rlhf bench -o here.json` measures this machine for `rlhf plan --gpu here.json`")
    return [*lines, f"{figures.count(len(plan['stages']), 'stage')}. Nothing was run or changed."]


def _stage(plan: Json, stage: Json) -> list[str]:
    lines = [stage["address"], *_engines(stage), *_memory(plan, stage), *_time(stage), *_batch(stage), *_score(stage)]
    for name, edge in stage["edges"].items():
        if edge is not None:
            lines += edges.edge(name, edge)
    lines += _writes(stage)
    return lines


def _score(stage: Json) -> list[str]:
    """The terms of the score, where it is not a reward model's alone. What is called is named with its hash."""
    sources = stage["settings"].get("reward", {"sources": []})["sources"]
    if all(source["kind"] == "model" and source["weight"] == 1 for source in sources):
        return []
    lines: list[str] = []
    for source in sources:
        match source["kind"]:
            case "model":
                what = f"engine {source['engine']}"
            case "endpoint":
                what = f"POST {source['url']}, at most {source['timeout']:g} s"
            case _:
                pins = source["facts"]["files"].values() if source["facts"] is not None else ()
                hashes = "".join(f" ({pin['sha256'][:19]})" for pin in pins) or f" {LATER}"
                what = f"{source['function']} of {source['file']}{hashes}"
        lines.append(f"  {'' if lines else 'score':<9} {source['weight']:+g} x {source['name']}: {what}")
    return lines


def _engines(stage: Json) -> list[str]:
    engines, memory = stage["engines"], stage["memory"]["engines"]
    rows: list[list[str]] = [["", *engines]]
    rows.append(["  model", *(_weights(engine) for engine in engines.values())])
    rows.append(["  parameters", *(figures.parameters(memory[name]["parameters"]) for name in engines)])
    if any(engine["lora"] is not None or engine["shares"] for engine in engines.values()):
        rows.append(["  LoRA", *(_lora(engine, memory[name]["trained"]) for name, engine in engines.items())])
    rows.append(["  type", *(engine["dtype"] for engine in engines.values())])
    rows.append(["  ZeRO / offload", *(f"{e['zero']} / {_offload(e['offload'])}" for e in engines.values())])
    rows.append(["  micro x accum", *(f"{e['micro']} x {e['accumulation']}" for e in engines.values())])
    rows.append(
        ["  checkpointing", *("on" if e["gradient_checkpointing"] else "off" for e in engines.values())]
    )
    rows.append(["  learning rate", *(_schedule(engine["schedule"]) for engine in engines.values())])
    rows.append(["  GiB: stays", *(figures.gib(memory[name]["lasting"]) for name in engines)])
    for phase in stage["memory"]["phases"]:
        if phase != "generate":
            sets = [memory[name]["working"].get(phase) for name in engines]
            rows.append([f"       {phase}", *("-" if size is None else figures.gib(size) for size in sets)])
    if any(memory[name]["host"] for name in engines):
        rows.append(["       on the host", *(figures.gib(memory[name]["host"]) for name in engines)])
    if any(memory[name]["disk"] for name in engines):
        rows.append(["       on NVMe", *(figures.gib(memory[name]["disk"]) for name in engines)])
    return figures.table(rows)


def _memory(plan: Json, stage: Json) -> list[str]:
    """The peak of each phase against the device."""
    memory = stage["memory"]
    rollout = stage["engines"]["actor"]["rollout"] if "actor" in stage["engines"] else None
    lines = [] if rollout is None else [f"  rollout   {rollout['engine']}: {rollout['reason']}"]
    if not memory["phases"]:
        return [*lines, f"  peak      {LATER}"]
    device = plan["target"]["gpu"] or "device"
    for name, phase in memory["phases"].items():
        stay, work = figures.gib(phase["resident"]), figures.gib(phase["working"])
        line = f"  {name:<9} {figures.gib(phase['peak'])} GiB = {stay} that stay + {work}"
        if name == "generate":
            rows = figures.count(stage["batch"]["generate_per_rank"], "sequence")
            line += f" for {rows} at once, {figures.gib(memory['cache'])} of them cache"
        elif len(stage["engines"]) > 1:
            line += f" of the {phase['engine']}"
        lines.append(line)
    peak = f"  peak      {figures.gib(memory['peak'])} GiB"
    if memory["available"] is not None:
        share = memory["peak"] / memory["available"]
        peak += f" of {figures.gib(memory['available'])} on each {device} ({share:.0%})"
        peak += "  ok" if memory["fits"] else "  does not fit"
    lines.append(peak + " (estimate)")
    if memory["host"]:
        host, whole = f"  host      {figures.gib(memory['host'])} GiB", plan["target"]["host"]
        if whole is not None:
            host += f" of {figures.gib(whole)} on each node ({memory['host'] / whole:.0%})"
            host += "  ok" if memory["host"] <= memory["host_usable"] else "  does not fit"
        lines.append(host + (" (estimate)" if whole is not None else " on each node (estimate)"))
    return lines


def _time(stage: Json) -> list[str]:
    time = stage["time"]
    if time is None:
        return []
    each = time["each"]
    unit = "rollout" if "rollouts" in stage["batch"] else "update"
    phases = [f"{name} {figures.duration(value)}" for name, value in each.items()]
    parts = f" = {' + '.join(phases)}" if len(phases) > 1 else ""
    whole = "" if time["seconds"] is None else f"; ~ {figures.duration(time['seconds'])} in all"
    return [f"  time      ~ {figures.duration(sum(each.values()))} for each {unit}{parts}{whole} (estimate)"]


def _batch(stage: Json) -> list[str]:
    batch = stage["batch"]
    world = batch["world"]
    if "rollouts" in batch:
        actor = stage["engines"]["actor"]
        train = batch["minibatch"] // world
        lines = [
            f"  batch     {figures.number(batch['prompts'])} prompts x {figures.count(batch['answers'], 'answer')} = "
            f"{world} x {batch['per_rank']};  {figures.count(batch['minibatches'], 'minibatch')} of "
            f"{batch['minibatch']} = {world} x micro {actor['micro']} x accum {train // actor['micro']}",
            f"  length    {figures.count(batch['rollouts'], 'rollout')} x "
            f"{figures.count(batch['updates_per_rollout'], 'update')} = "
            f"{figures.number(batch['updates'])};  {_rows(batch, 'prompts')}",
        ]
        if batch["ptx"] is not None:
            ptx = batch["ptx"]
            each = f"{world} x {ptx['per_rank']}"
            lines.append(f"  ptx       {ptx['batch']} sequences = {each}, micro {ptx['micro']}")
        return lines
    item = "sequences" if stage["kind"] == "sft" else "pairs"
    return [
        f"  batch     {figures.number(batch['batch'])} {item} = {world} x micro {batch['micro']} x accum "
        f"{batch['accumulation']}",
        f"  length    {figures.count(batch['updates'], 'update')};  {_rows(batch, item)}",
    ]


def _rows(batch: Json, item: str) -> str:
    if batch["rows"] is None:
        return f"{item} {LATER}"
    if batch["dropped_tail"]:
        return f"{figures.number(batch['rows'])} {item}, of which {figures.number(batch['dropped_tail'])} in no batch"
    return f"{figures.number(batch['rows'])} {item}"


def _writes(stage: Json) -> list[str]:
    return [
        f"  {'' if number else 'writes':<9} {made['path']}  {figures.size(made['bytes'])}"
        for number, made in enumerate(stage["writes"])
    ]


def _weights(engine: Json) -> str:
    weights = engine["weights"]
    if "model" in weights:
        return str(weights["model"])
    named = weights["artifact"] in ("ema", "critic")
    return f"{weights['stage']}.{weights['artifact']}" if named else str(weights["stage"])


def _lora(engine: Json, trained: int | None) -> str:
    if engine["shares"]:
        return f"base of {engine['shares']}"
    if engine["lora"] is None:
        return "-"
    base = " beside nf4" if "base" in engine["lora"] else ""
    return f"rank {engine['lora']['rank']}{base}: {figures.parameters(trained)}"


def _schedule(schedule: Json | None) -> str:
    if schedule is None:
        return "-"
    warm = f", warm-up {figures.number(schedule['warmup'])}" if schedule["warmup"] != 0 else ""
    rate = f"{schedule['lr']:e}"
    digits, _, power = rate.partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)} {schedule['kind']}{warm}"


def _offload(offload: str) -> str:
    return "-" if offload == "off" else offload
