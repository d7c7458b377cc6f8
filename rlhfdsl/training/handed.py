"""What a loop of one's own hands to a trainer, held against the stage: of another form, it would be learnt as it is."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from rlhfdsl.data.edge import Prompt
from rlhfdsl.engines.engine import Engine
from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.training.experience import Experience


def check_reward(reward: Any) -> None:
    """Refuse what cannot be called with answers alone, as a function of prompts and answers cannot."""
    try:
        inspect.signature(reward).bind(None)
    except TypeError:
        name = getattr(reward, "__name__", type(reward).__name__)
        refuse(f"the reward `{name}` does not take answers as the trainer has them",
               f"`stage.reward({name})` makes a reward of a function of prompts and answers")  # fmt: skip


def check_engine(engine: Any) -> None:
    """Refuse to save what has no weights of its own: a name, or the base below an actor's adapters."""
    if not isinstance(engine, Engine):
        refuse(f"`save` takes an engine, not a {type(engine).__name__}",
               "for example `trainer.engines.actor`, or `.critic`")  # fmt: skip


def check_name(directory: Path, name: str) -> None:
    """Refuse to save outside `directory`, or in place of what is no model: what is there is replaced whole."""
    path = directory / name
    if directory.resolve() not in path.resolve().parents:
        refuse(f"`save` writes into `{directory}`, and `{name}` is not a name in it",
               "for example `policy`; `open_stage(…, output=…)` says where")  # fmt: skip
    if path.exists() and not (path / "config.json").is_file():
        refuse(f"`{path}` is there, and it is not a model", "`save` replaces a model of that name, and nothing else")


def check_prompts(prompts: Sequence[Prompt], rows: Sequence[int], longest: int) -> None:
    """Refuse prompts that cannot be sampled from, or are longer than the plan has room for (`longest` tokens)."""
    if len(prompts) == 0:
        refuse("there is no prompt to answer", "every rank takes part in a rollout, with a prompt at least")
    if len(prompts) != len(rows):
        refuse(f"there are {len(prompts)} prompts and {len(rows)} numbers of rows",
               "`stage.prompts(rollout)` gives both")  # fmt: skip
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, Prompt):
            refuse(f"prompt {number} is a {type(prompt).__name__}",
                   "`stage.prompts(rollout)` gives prompts; `rlhfdsl.data.edge.Prompt` makes one of ids")  # fmt: skip
        if not 0 < len(prompt.ids) <= longest:
            refuse(f"prompt {number} has {len(prompt.ids)} tokens, and `rollout {{ prompt = {longest} }}`",
                   "the plan has room for that many: cut it, or set `prompt` higher")  # fmt: skip


def check_experience(experience: Experience, minibatch: int, *, critic: bool) -> None:
    """Refuse an experience that is not whole minibatches of this rank, or in which a tensor has another form.

    critic: whether the update needs values and returns.
    """
    if not isinstance(experience, Experience):
        refuse(f"`train_step` takes an experience, not a {type(experience).__name__}",
               "`generate_experience` returns two things: experience, metrics")  # fmt: skip
    if len(experience) == 0 or len(experience) % minibatch:
        refuse(f"{len(experience)} answers on this rank are not whole minibatches of {minibatch}",
               "an update takes `minibatch` of the recipe / ranks; `experience.take(rows)` is a part")  # fmt: skip
    shape = experience.mask.shape
    needed = ("log_probs", "ref_log_probs", "advantages", *(("values", "returns") if critic else ()))
    for name in needed:
        tensor = getattr(experience, name)
        if not isinstance(tensor, torch.Tensor) or tensor.shape != shape:
            found = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            refuse(f"`{name}` of the experience is {found}, not {list(shape)}",
                   "one number for each token of each answer, 0 outside `mask`")  # fmt: skip


def check_ptx(ptx: Sequence[Any], settings: dict[str, Any], updates: int) -> None:
    """Refuse pretraining rows that the stage has no setting for, or that are not one list for each update."""
    if not ptx:
        return
    if settings["ptx"] is None:
        refuse("the stage mixes no pretraining rows in", "give it a block `ptx { data = …, weight = … }`")
    if len(ptx) != updates:
        refuse(f"there are pretraining rows for {len(ptx)} updates, and this rollout has {updates}",
               "`stage.pretraining(rollout)` gives them")  # fmt: skip


def refuse(message: str, help: str) -> NoReturn:
    raise UserError("E0784", message, help=help)
