"""The settings of a command, one by one, under our names; what has none is noted."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import isfinite

from rlhfdsl.language import schema
from rlhfdsl.language.evaluate import Evaluator
from rlhfdsl.language.foreign.reading import Command, Given
from rlhfdsl.language.foreign.tools import TOOLS, aliases
from rlhfdsl.language.parser import parse_assignment
from rlhfdsl.language.settings import attributes_of
from rlhfdsl.language.source import SourceFile
from rlhfdsl.language.suggest import listed, nearest
from rlhfdsl.language.values import INVALID, fit, in_range

_YES = ("", "true", "on", "yes", "1")
NO = ("false", "off", "no", "0", "none", "null")
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
_DTYPES = {"bfloat16": "bf16", "bf16": "bf16", "float16": "fp16", "fp16": "fp16", "float32": "fp32", "fp32": "fp32"}
_BOTH = ("lr", "schedule", "warmup", "weight_decay", "grad_clip")
_COUNTS = ("rows", "minibatches", "micro", "batch", "accumulation", "gpus", "nodes", "generation", "generations")
# The columns of the rows that a stage reads, and which of them an `input_key` means.
_ROLES = {"sft": ("messages",), "ppo": ("prompt",)}
_PAIRS = ("prompt", "chosen", "rejected")
# What a tool does when nothing is said, for settings that a recipe always says.
_DEFAULTS = {
    "DeepSpeed-Chat": {"lr": "1e-3", "actor.lr": "9.65e-6", "critic.lr": "5e-6", "length": "512", "kl.coef": "0.1",
                       "rollout.prompt": "256", "rollout.answer": "256", "@micro": "16"},
    "OpenRLHF": {"lr": "5e-6", "actor.lr": "1e-6", "critic.lr": "9e-6", "length": "2048", "kl.coef": "0.01",
                 "rollout.prompt": "1024", "rollout.answer": "1024", "@batch": "128", "rollout.batch": "1024",
                 "dpo: lr": "1e-5", "dpo: length": "512"},
    "TRL": {"lr": "2e-5", "actor.lr": "3e-6", "critic.lr": "3e-6", "length": "1024", "kl.coef": "0.05",
            "rollout.prompt": "512", "rollout.answer": "53", "@micro": "8", "dpo: lr": "1e-6"},
    "LLaMA-Factory": {"lr": "5e-5", "actor.lr": "5e-5", "critic.lr": "5e-5", "length": "2048", "kl.coef": "0.1",
                      "rollout.prompt": "1024", "rollout.answer": "512", "@micro": "8"},
    "axolotl": {"lr": "2e-4", "length": "512", "@micro": "1"},
}  # fmt: skip


@dataclass(slots=True)
class Draft:
    """What was found, by target; `@` targets are what writing.py puts together."""

    command: Command
    values: dict[str, str] = field(default_factory=dict)
    lists: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: list[tuple[int, str, str]] = field(default_factory=list)

    def number(self, target: str, default: int | None = None) -> int | None:
        text = self.values.get(target) or _DEFAULTS[self.command.tool].get(target, "")
        return int(text) if text.isdigit() else default

    def note(self, given: Given, why: str) -> None:
        self.notes.append((given.line, given.name, why))

    def assume(self, target: str) -> None:
        """The tool's own default for a setting that a recipe always says."""
        if target not in self.values:
            defaults = _DEFAULTS[self.command.tool]
            self.values[target] = defaults.get(f"{self.command.stage}: {target}", defaults[target])
            self.notes.append((0, target, f"not given; {self.command.tool} takes {self.values[target]}"))


def take(draft: Draft, given: Given) -> None:
    """One setting into the draft, or a note about it."""
    command = draft.command
    tool = TOOLS[command.tool]
    name = given.name if given.name in tool.names or given.name in tool.without else given.name.replace("-", "_")
    text = given.values[0] if given.values else ""
    if name in tool.without and name not in tool.names:
        if tool.without[name] and text.lower() not in NO:
            draft.note(given, tool.without[name])
        return
    target = tool.names.get(name) or aliases(command.tool, command.stage).get(name)
    if target is None:
        near = nearest(name, [*tool.names, *tool.without])
        help = f"; did it mean {listed(near)}?" if near else ""
        draft.note(given, f"no setting of {command.tool} that is known here{help}")
        return
    if "$" in text:
        draft.note(given, f"its value `{text}` comes from outside")
        return
    if target.startswith("@"):
        _special(draft, given, target, text)
        return
    if command.stage == "ppo" and target in _BOTH:
        for role in ("actor", "critic"):
            _set(draft, given, f"{role}.{target}", text)
    else:
        _set(draft, given, target, text)


def _set(draft: Draft, given: Given, target: str, text: str) -> None:
    """A setting of the stage, when it has it and the table takes the value."""
    if target not in attributes_of(f"stage.{draft.command.stage}"):
        draft.note(given, f"has no counterpart in a {draft.command.stage} stage")
        return
    type_, _, last = f"stage.{draft.command.stage}.{target}".rpartition(".")
    value = value_of(type_, last, text)
    if value is None:
        draft.note(given, f"`{text}` is nothing that `{target}` takes")
    else:
        draft.values.setdefault(target, value)


def value_of(type_: str, name: str, text: str) -> str | None:
    """The text as a value of an attribute; None when the table does not take it."""
    attr = schema.definition(type_).attributes[name]
    shapes = {schema.shape(alternative) for alternative in attr.alternatives}
    low = text.lower()
    if "switch" in shapes and low in (*_YES, *NO):
        text = "on" if low in _YES else "off"
    elif shapes & {"text", "source"}:
        text = f'"{text}"'
    elif re.fullmatch(r"\.\d+|\d+\.", text):
        text = f"{float(text):g}"
    elif re.fullmatch(r"\d+\.0*", text) and "count" in shapes:
        text = text.partition(".")[0]
    assignment, problems = parse_assignment(SourceFile("t", f"{name} = {text}"))
    if assignment is None or problems:
        return None
    value = Evaluator({}, {}, problems, True).value(assignment.value)
    fitted = [(a, fit(a, value)) for a in attr.alternatives] if value is not None else []
    return text if any(plain is not INVALID and in_range(a, plain) for a, plain in fitted) else None


def _special(draft: Draft, given: Given, target: str, text: str) -> None:
    """What stands outside the stage, or is calculated."""
    kind, _, last = target.removeprefix("@").partition(".")
    low = text.lower()
    ppo = draft.command.stage == "ppo"
    match kind:
        case "recipe" | "model" | "judge" | "ptx" | "subset" | "data_split" | "columns" if not text:
            draft.note(given, "it has no value")
        case "data":
            draft.lists["@data"] = tuple(part for value in given.values for part in value.split(",") if part)
        case "data_split":
            draft.values["@data.split"] = text
        case "split":
            draft.lists["@split"] = tuple(text.split(",")) if len(given.values) == 1 else given.values
        case "deepspeed":
            stage = re.search(r"z(?:ero)?[_-]?(?:stage)?[_-]?([0-3])", low)
            if not text:
                return  # the switch that DeepSpeed-Chat's launcher takes
            if stage is None:
                draft.note(given, "write what it says into a `parallel` block")
            else:
                draft.values["@parallel.zero"] = stage.group(1)
                draft.note(given, f"read as zero = {stage.group(1)} from its name")
        case "bf16" | "fp16":
            if low in _YES:
                draft.values["@model.dtype"] = kind
            elif low not in (*NO, "auto"):
                draft.note(given, f"`{text}` is neither true nor false")
        case "model" if last == "dtype":
            if low in _DTYPES:
                draft.values["@model.dtype"] = _DTYPES[low]
            else:
                draft.note(given, f"`{text}` is none of bf16, fp16, fp32")
        case "schedule":
            if low in _SCHEDULES:
                _spread(draft, given, "schedule", _SCHEDULES[low])
            else:
                draft.note(given, f"`{text}` is none of cosine, linear, constant")
        case "warmup":
            ratio = is_number(text) and ("ratio" in given.name or 0 < float(text) < 1)
            _spread(draft, given, "warmup", f"{float(text) * 100:g}%" if ratio else text)
        case "lr" | "weight_decay" | "grad_clip":
            _spread(draft, given, kind, text)
        case "length":
            _set(draft, given, "rollout.prompt" if ppo else "length", text)
        case "epochs":
            _set(draft, given, "update.epochs" if ppo else "epochs", text)
        case "steps":
            if ppo:
                draft.note(given, "a run of PPO is counted in rollouts")
            elif text.lstrip("+").isdigit() and int(text) > 0:
                _set(draft, given, "steps", text)
        case "ema":
            draft.values["actor.ema"] = "0.992"
        case "top_k" if text.lstrip("-+").isdigit() and int(text) <= 0:
            pass  # all tokens
        case "top_p" if is_number(text) and float(text) >= 1:
            pass
        case "top_k" | "top_p":
            _set(draft, given, f"rollout.{kind}", text)
        case "missing_eos":
            _set(draft, given, "reward.missing_eos", f"-{text.lstrip('-')}")
        case "inputs":
            if low in _YES and draft.command.stage == "sft":
                draft.values["loss"] = "all"
        case "offload":
            draft.values["@parallel.offload"] = "optimizer"
            draft.note(given, "written as offload = optimizer")
        case _ if kind in _COUNTS:
            if re.fullmatch("[1-9][0-9]{0,8}", text):
                draft.values[f"@{kind}"] = text
            else:
                draft.note(given, f"`{text}` is not a whole number")
        case "subset":
            draft.values["@subset"] = text
        case "lora" | "actor_lora" | "critic_lora":
            draft.lists[target] = tuple(part for value in given.values for part in value.split(","))
            if given.name == "quantization_bit" and low not in ("4", *NO):
                draft.note(given, "the frozen weights are held in 4 bits or in their own type")
        case "columns":
            roles = _ROLES.get(draft.command.stage, _PAIRS)
            role = roles[0] if last == "input" else last
            if role in roles:
                draft.values[f"@columns.{role}"] = text
            else:
                draft.note(given, f"rows of a {draft.command.stage} stage have no such column")
        case "model" | "judge" | "ptx":
            draft.values[target] = text
        case "recipe" if last == "output":
            draft.values[target] = text
        case "parallel" | "critic" | "recipe":
            value = value_of("recipe" if kind == "recipe" else "parallel", last, text)
            if value is None:
                draft.note(given, f"`{text}` is nothing that `{last}` takes")
            else:
                draft.values[target] = value


def is_number(text: str) -> bool:
    """Whether a text is a plain number."""
    return re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)(e-?[0-9]+)?", text) is not None and isfinite(float(text))


def _spread(draft: Draft, given: Given, target: str, text: str) -> None:
    """A setting of an engine: the stage's own, or in PPO the actor's and the critic's."""
    for role in ("actor.", "critic.") if draft.command.stage == "ppo" else ("",):
        _set(draft, given, role + target, text)


