"""A shell script, a command line or a YAML file to names and values, and which tool and stage they are for."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any

from rlhfdsl.language.foreign.tools import TOOLS
from rlhfdsl.language.suggest import listed

_ASSIGNMENT = re.compile(r"^\s*(?:export\s+)?([A-Za-z_]\w*)=(\"[^\"]*\"|'[^']*'|[^\s;&|]*)\s*$")
STAGES = ("sft", "reward", "dpo", "ppo")
# Settings that only one of TRL's trainers has, the more particular first.
_TRL = {
    "grpo": {"num_generations", "reward_funcs", "max_completion_length"},
    "rloo": {"rloo_k"},
    "kto": {"desirable_weight", "undesirable_weight"},
    "reward": {"center_rewards_coefficient"},
    "dpo": {"beta", "max_prompt_length", "precompute_ref_log_probs", "label_smoothing"},
}
_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?::?-([^}]*))?\}|\$([A-Za-z_]\w*)")


@dataclass(frozen=True, slots=True)
class Given:
    """A setting as it was given; no value for a bare flag."""

    name: str
    values: tuple[str, ...]
    line: int


@dataclass(frozen=True, slots=True)
class Command:
    """What another tool was to do: tool, kind of stage (one of STAGES), settings in their order."""

    tool: str
    stage: str
    settings: tuple[Given, ...]


class Unreadable(Exception):
    """The text is nothing that can be imported; the message says why."""


def read_command(text: str, tool: str | None = None) -> Command:
    """The command that a text holds: YAML when it reads as a mapping, else a shell script or command line."""
    settings, program = _yaml(text) if _is_yaml(text) else _shell(text)
    names = {given.name for given in settings}
    found = tool or _tool(text, names)
    if found is None:
        raise Unreadable(f"this is a command of none of {', '.join(TOOLS)}: name the tool with --tool")
    stage = _stage(found, program, settings)
    return Command(found, stage, tuple(settings))


def _is_yaml(text: str) -> bool:
    lines = [line for line in text.split("\n") if line.strip() and not line.lstrip().startswith(("#", "---"))]
    return bool(lines) and re.match(r'[A-Za-z_][\w.]*\s*:(\s|$)|\{\s*("|$)', lines[0]) is not None


def _yaml(text: str) -> tuple[list[Given], str]:
    import yaml  # type: ignore[import-untyped]

    try:
        # Every scalar as it is written: YAML reads `1e-5` as a text and `no` as false.
        data = yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise Unreadable(f"this YAML cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict):
        raise Unreadable("this YAML is not a mapping of settings")
    settings = []
    for name, value in data.items():
        if value in ("", "~", "null"):
            continue  # as if it were not there
        match = re.search(rf'^\s*"?{re.escape(str(name))}"?\s*:', text, re.MULTILINE)
        line = text.count("\n", 0, match.start()) + 1 if match is not None else 1
        settings.append(Given(str(name), tuple(_flat(value)), line))
    return settings, ""


def _flat(value: Any) -> list[str]:
    """A value as texts; of a list of mappings (axolotl's datasets) each mapping's path."""
    if isinstance(value, list):
        return [text for item in value for text in _flat(item)]
    if isinstance(value, dict):
        return [str(value["path"])] if isinstance(value.get("path"), str) else []
    return [] if value is None or value == "" else [str(value)]


def _shell(text: str) -> tuple[list[Given], str]:
    variables: dict[str, str] = {}
    lines = re.sub(r"\\\r?\n", lambda match: " \x00 ", text).split("\n")
    number = 1
    best: tuple[list[Given], str] = ([], "")
    for line in lines:
        assignment = _ASSIGNMENT.match(line)
        if assignment is not None:
            value = assignment.group(2).strip("\"'")
            if not re.fullmatch(r"\$\d", value):  # `OUTPUT=$1`: its default stands further down
                variables[assignment.group(1)] = _expand(value, variables)
        elif "--" in line and not line.lstrip().startswith("#"):
            found = _words(_expand(line, variables), number)
            best = found if len(found[0]) > len(best[0]) else best
        number += 1 + line.count("\x00")
    if not best[0]:
        file = re.search(r"\S+\.ya?ml\b", text)
        where = f"; its settings are in {file.group()}: import that file" if file else ""
        raise Unreadable(f"there is no command with --options here{where}")
    return best


def _expand(text: str, variables: dict[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(3)
        return variables.get(name, match.group(2) or match.group(0))

    return _VARIABLE.sub(value, text)


def _words(line: str, number: int) -> tuple[list[Given], str]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise Unreadable(f"line {number} is not a command: {str(error).lower()}") from error
    settings: list[Given] = []
    program: list[str] = []
    for word in words:
        if word == "\x00":
            number += 1
        elif word == "--":
            settings = []  # what stands before was for the program that starts this one: `ray job submit … -- python …`
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            settings.append(Given(name, (value,) if equals else (), number))
        elif word.endswith(".py") or (settings and settings[-1] == Given("module", (), number)):
            program.append(word)  # behind the options of its launcher
            settings = [given for given in settings if given.name != "module"]
        elif word in ("&>", ">", "|", "&", "2>&1", "&&", "||"):
            break
        elif settings:
            last = settings[-1]
            settings[-1] = Given(last.name, (*last.values, word), last.line)
        else:
            program.append(word)
    return settings, " ".join(program)


def _tool(text: str, names: set[str]) -> str | None:
    for name, tool in TOOLS.items():
        if any(mark in text for mark in tool.marks):
            return name
    scored = {name: len(names & tool.names.keys()) for name, tool in TOOLS.items()}
    best = max(scored, key=lambda name: scored[name])
    return best if scored[best] >= 3 else None


def _stage(tool: str, program: str, settings: list[Given]) -> str:
    """The kind of stage: as the program or a setting names it, else told by settings that only one kind has."""
    values = {given.name: given.values[0].lower() for given in settings if given.values}
    names = {given.name for given in settings}
    estimator = values.get("advantage_estimator", values.get("algo.advantage.estimator", "gae"))
    loss = values.get("pref_loss", values.get("loss_type", "sigmoid"))
    own = (values.get(name, "") for name in ("stage", "rl", "type"))
    text = re.sub("[_/.]", " ", f"{program} {' '.join(own)}".lower())
    named = re.search(r"\b(dpo|kto|orpo|cpo|grpo|rloo|simpo|ipo|pt|ppo)\b", text)
    if estimator != "gae":
        kind = {"group_norm": "grpo", "dr_grpo": "grpo"}.get(estimator, estimator)
    elif named is not None:
        kind = named.group()
    elif {"actor_model_name_or_path", "prompt_data", "reward_model_path"} & names:
        kind = "ppo"
    elif re.search(r"\brm\b|reward", text) or {"num_padding_at_beginning", "reward_model"} & names:
        kind = "reward"
    elif tool == "TRL":  # whose YAML does not say which of its scripts it is for
        kind = next((kind for kind, marks in _TRL.items() if marks & names), "sft")
    else:
        kind = "sft"
    if kind == "dpo" and (loss != "sigmoid" or "ipo" in names):
        kind = "ipo" if "ipo" in names else loss
    if kind not in STAGES:
        by_hand = f"; `rlhf explain stage.{kind}` tells what one has here" if kind in ("grpo", "rloo") else ""
        raise Unreadable(f"this is a run of {tool} with {kind}; what is imported is {listed(STAGES)}{by_hand}")
    return kind
