"""A command of another tool as a recipe: its settings under our names, its batch algebra worked out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhfdsl.language import schema
from rlhfdsl.language.compile import load
from rlhfdsl.language.foreign.adapters import adapters
from rlhfdsl.language.foreign.reading import Command
from rlhfdsl.language.foreign.taking import Draft, is_number, take
from rlhfdsl.language.format import layout


@dataclass(frozen=True, slots=True)
class Imported:
    """A recipe's text, and a note (line, name, why) for each setting that is not in it as it was given."""

    text: str
    notes: tuple[tuple[int, str, str], ...]


def convert(command: Command, name: str = "imported") -> Imported:
    """The recipe of a command, in its one form; a setting that our table refuses is noted, not written."""
    draft = Draft(command)
    for given in command.settings:
        take(draft, given)
    text = layout(_recipe(draft, name))
    compilation = load(Path("imported.rlhf"), overlay=lambda path: text)
    for one in compilation.diagnostics:
        line = compilation.sources["imported.rlhf"].position(one.span.start)[0] if one.span is not None else 0
        draft.notes.append((0, f"recipe line {line}", f"{one.message} [{one.code}]"))
    notes = sorted(draft.notes, key=lambda note: note[0])
    head = [f"# From a {command.stage} run of {command.tool}."]
    if notes:
        head.append("# What did not go over as it was:")
        head += [f"#   {name}: {why}" for _, name, why in notes]
    return Imported("\n".join(head) + "\n" + text, tuple(notes))


def _recipe(draft: Draft, name: str) -> str:
    """The text of the recipe, not yet in its one form."""
    stage, values = draft.command.stage, draft.values
    _batches(draft)
    adapters(draft)
    always = ("actor.lr", "critic.lr", "rollout.prompt", "rollout.answer", "kl.coef")
    for target in always if stage == "ppo" else ("lr", "length"):
        draft.assume(target)
    if "steps" in values:
        values.pop("epochs", None)
    out = [_block(f'recipe "{re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "imported"}"', {
        "seed": values.get("@recipe.seed"), "output": _quoted(values.get("@recipe.output")),
    })]  # fmt: skip
    if "@gpus" in values:
        out.append(_block("cluster node", {"gpus": values["@gpus"], "nodes": values.get("@nodes")}))
    out += _models(draft)
    out += _data(draft)
    for block, prefix in (("shard", "@parallel."), ("critic", "@critic.")):
        own = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        if block == "shard" and "@micro" in values and values["@micro"].isdigit():
            own["micro"] = values["@micro"]
        if own and (block == "shard" or stage == "ppo"):
            out.append(_block(f"parallel {block}", own))
            for role in ("actor", "critic") if stage == "ppo" and block == "shard" else ("critic",):
                values[f"{role}.parallel" if stage == "ppo" else "parallel"] = f"parallel.{block}"
    out.append(_stage(draft))
    return "\n".join(out)


def _batches(draft: Draft) -> None:
    """Batches over all GPUs from what each GPU takes."""
    values, stage = draft.values, draft.command.stage
    world = (draft.number("@gpus", 1) or 1) * (draft.number("@nodes", 1) or 1)
    if "@gpus" not in values and "@batch" not in values:
        draft.notes.append((0, "GPUs", "their number is not given; batches are for one GPU"))
    each = (draft.number("@micro", 8) or 8) * (draft.number("@accumulation", 1) or 1) * world
    batch = draft.number("@batch") or each
    if stage != "ppo":
        values["batch"] = str(batch)
        return
    values["update.minibatch"] = str(batch)
    if "rollout.batch" not in values:
        made = (draft.number("@generation") or 0) * (draft.number("@generations", 1) or 1) * world
        default = draft.number("rollout.batch") if "@batch" in values else None
        values["rollout.batch"] = str(made or default or batch * (draft.number("@minibatches", 1) or 1))
    sequences = int(values["rollout.batch"]) * int(values.get("rollout.answers", "1"))
    if sequences < batch:
        values["update.minibatch"] = str(sequences)


def _models(draft: Draft) -> list[str]:
    values, stage = draft.values, draft.command.stage
    dtype = values.get("@model.dtype")
    if "@model.from" not in values:
        draft.notes.append((0, "model", "not given; facebook/opt-1.3b stands for it"))
    base = {"from": _source(values.get("@model.from", "facebook/opt-1.3b")), "dtype": dtype}
    base["revision"] = _quoted(values.get("@model.revision"))
    blocks = [_block("model base", base)]
    values["actor.model" if stage == "ppo" else "model"] = "model.base"
    if stage == "ppo":
        judge = values.get("@judge.from", "facebook/opt-350m")
        if "@judge.from" not in values:
            draft.notes.append((0, "reward model", f"not given; {judge} stands for it"))
        blocks.append(_block("model judge", {"from": _source(judge), "head": "scalar", "dtype": dtype}))
        values["critic.model"] = values["reward.model"] = "model.judge"
    return blocks


def _data(draft: Draft) -> list[str]:
    values, command = draft.values, draft.command
    chat = command.tool == "DeepSpeed-Chat"
    forms = {"reward": "preference", "dpo": "preference", "ppo": "prompt", "sft": "chat"}
    form = "preference" if chat else forms[command.stage]
    paths = draft.lists.get("@data", ())
    if not paths:
        draft.notes.append((0, "data", "not given; ./data/rows.jsonl stands for it"))
        paths = ("./data/rows.jsonl",)
    if not chat:
        draft.notes.append((0, "format", f"rows are taken to be {form}: say so if they are another"))
    named = {key.removeprefix("@columns."): text for key, text in values.items() if key.startswith("@columns.")}
    columns = {role: _quoted(text) for role, text in named.items() if text != role}
    names: list[str] = []
    blocks = []
    for path in paths:
        last = path.rstrip("/").rpartition("/")[2].partition(".")[0]
        word = re.sub(r"[^A-Za-z0-9_]+", "_", last).strip("_").lower() or "rows"
        word = word if not word[0].isdigit() else f"data_{word}"
        names.append(word if word not in names else f"{word}_{len(names)}")
        if command.tool == "LLaMA-Factory":
            draft.notes.append((0, path, "a name in dataset_info.json: `from` is where that file says it is"))
        own = {"from": _source(path), "format": form, "rows": _count(values.get("@rows"))}
        own |= {"subset": _quoted(values.get("@subset")), "split": _quoted(values.get("@data.split"))}
        whole = _block(f"data {names[-1]}", own)
        blocks.append(whole.rstrip()[:-1] + f"\n{_block('columns', columns)}}}\n" if columns else whole)
    parts = dict(zip(("sft", "reward", "ppo"), map(_number, draft.lists.get("@split", ())), strict=False))
    if len(names) > 1 or parts:
        shares = _shares({name: 1.0 for name in names})
        split = f"split {{ {_line(_shares(parts))} }}" if sum(parts.values()) else ""
        blocks.append(f"blend chat {{\nmix {{ {_line(shares)} }}\n{split}\n}}")
    values["data"] = "blend.chat" if len(names) > 1 or parts else f"data.{names[0]}"
    if "@ptx.data" in values and command.stage == "ppo":
        own = {"from": _source(values["@ptx.data"]), "subset": _quoted(values.get("@ptx.subset")), "format": "text"}
        blocks.append(_block("data pretrain", own))
        values |= {"ptx.data": "data.pretrain", "ptx.batch": values["update.minibatch"]}
        values.setdefault("ptx.weight", "27.8")
    else:
        values.pop("ptx.weight", None)
    return blocks


def _stage(draft: Draft) -> str:
    """The stage with its inner blocks, in the table's order."""
    stage, values = draft.command.stage, draft.values
    definition = schema.definition(f"stage.{stage}")
    order = ["model", "data", *definition.attributes]
    own = {name: values[name] for name in dict.fromkeys(order) if name in values}
    lines = [f"stage {stage} {{", *(f"{name} = {value}" for name, value in own.items())]
    for block, (type_, _) in definition.blocks.items():
        names = ["model", *schema.definition(type_).attributes]
        inner = {name: values[f"{block}.{name}"] for name in dict.fromkeys(names) if f"{block}.{name}" in values}
        lora = f"{block}.lora."
        beside = {name.removeprefix(lora): text for name, text in values.items() if name.startswith(lora)}
        if inner:
            whole = _block(block, inner).rstrip()
            lines.append(whole[:-1] + f"\n{_block('lora', beside)}}}" if beside else whole)
    return "\n".join([*lines, "}", ""])


def _block(head: str, settings: Mapping[str, str | None]) -> str:
    kept = {name: value for name, value in settings.items() if value is not None}
    if len(kept) <= 3:
        return f"{head} {{ {_line(kept)} }}\n" if kept else f"{head} {{ }}\n"
    return f"{head} {{\n" + "\n".join(f"{name} = {value}" for name, value in kept.items()) + "\n}\n"


def _line(settings: dict[str, str]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in settings.items())


def _shares(weights: dict[str, float]) -> dict[str, str]:
    """Weights as percentages of two decimals that sum to 100."""
    total = sum(weights.values()) or 1.0
    exact = {name: round(weight / total * 10_000) for name, weight in weights.items() if weight}
    last = next(reversed(exact)) if exact else ""
    if last:
        exact[last] += 10_000 - sum(exact.values())
    return {name: f"{share / 100:g}%" for name, share in exact.items()}


def _number(text: str) -> float:
    return float(text) if is_number(text) else 0.0


def _count(text: str | None) -> str | None:
    return text if text is not None and text.isdigit() else None


def _quoted(text: str | None) -> str | None:
    return None if text is None else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _source(text: str) -> str | None:
    """A `from`: what looks like a file or a folder gets `./`; hub ids stay."""
    hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", text)
    file = re.search(r"\.(jsonl?|csv|parquet|txt|arrow|gz)$", text)
    if text.startswith(("/", "./", "../")) or (hub and not file):
        return _quoted(text)
    return _quoted("./" + text.removeprefix("~/"))
