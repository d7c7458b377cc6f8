"""The parts of a stage for a loop of one's own: engines with actor, critic, reference and reward, and a trainer.

    stage = open_stage("own.rlhf", "stage.ppo")
    trainer = stage.trainer()
    for rollout in range(stage.rollouts):
        experience, metrics = trainer.generate_experience(*stage.prompts(rollout))
        metrics |= trainer.train_step(experience)
    stage.save(trainer.engines.actor, "policy")

The recipe says what the models, data and settings are, and its plan how they lie on the devices; the loop decides what
happens when. Started by DeepSpeed's launcher or torchrun, every rank runs the same script. The guide: docs/own-loop.md.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rlhfdsl.cli.planned import make_plan
from rlhfdsl.data.edge import Example, Prompt
from rlhfdsl.data.order import batch_rows
from rlhfdsl.engines import distributed
from rlhfdsl.engines.artifacts import save_model
from rlhfdsl.engines.engine import Engine
from rlhfdsl.language import UserError, render
from rlhfdsl.planning.places import make_output
from rlhfdsl.training import grpo, loop, ppo, rloo
from rlhfdsl.training.context import Context
from rlhfdsl.training.evaluation import answer, summary
from rlhfdsl.training.gate import pass_gate
from rlhfdsl.training.handed import check_engine, check_name, check_reward, refuse
from rlhfdsl.training.onpolicy import Engines, OnPolicy
from rlhfdsl.training.rewards import Function, TextReward

__all__ = ["Engines", "OnPolicy", "Stage", "open_stage"]

logger = logging.getLogger(__name__)

TRAINERS: dict[str, type[OnPolicy]] = {"ppo": ppo.Trainer, "grpo": grpo.Trainer, "rloo": rloo.Trainer}


def open_stage(
    recipe: str | Path,
    address: str,
    *,
    params: Mapping[str, str] | None = None,
    sets: Sequence[str] = (),
    profile: str | None = None,
    output: str | Path | None = None,
) -> Stage:
    """Plan a recipe for the ranks of this process group and open its stage `address` (`stage.ppo`).

    params, sets, profile: as -p, --set and --profile of the command. output: where `save` writes, by default `own`
    in the recipe's output. Weights that another stage makes are read from where `rlhf run` left them. Raises UserError
    with the plan's diagnostics, and for a stage that is not there or does not learn from its own answers.
    """
    if isinstance(sets, str):
        refuse(f"`sets` is one text, `{sets}`", f"it takes a list of them: sets=[{sets!r}]")
    device = distributed.join("cuda" if torch.cuda.is_available() else "cpu")
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or distributed.world())
    options = argparse.Namespace(
        file=str(recipe), sets=list(sets), param=[f"{k}={v}" for k, v in (params or {}).items()], profile=profile,
        gpu=None if device.type == "cuda" else "cpu", gpus=local, nodes=distributed.world() // local, price=None,
        host_memory=None,
    )  # fmt: skip
    if distributed.rank() != 0:
        distributed.barrier()  # the first rank makes what the lock lacks, the others read it
    planned = make_plan(options)
    if distributed.rank() == 0:
        distributed.barrier()
    plan = planned.plan
    if plan is None:
        errors = [d for d in planned.diagnostics if d.severity == "error"]
        text = render(errors, planned.compilation.sources, False)
        raise UserError(errors[0].code, f"`{recipe}` has no plan:\n{text}")
    stage = next((stage for stage in plan["stages"] if stage["address"] == address), None)
    if stage is None or stage["kind"] not in TRAINERS:
        usable = [stage["address"] for stage in plan["stages"] if stage["kind"] in TRAINERS]
        raise UserError("E0201", f"`{recipe}` has no stage `{address}` for a loop of one's own",
                        help=f"there is {', '.join(usable) or 'none'}")  # fmt: skip
    directory = Path(output) if output is not None else Path(plan["recipe"]["output"]) / "own"
    make_output(directory)
    base = Path(os.path.abspath(recipe)).parent
    return Stage(Context(plan, stage, base, directory, device, lambda event, **values: None))


class Stage:
    """A planned stage without its course: what it reads, its engines and its trainer."""

    def __init__(self, context: Context):
        self.context = context
        self._read: dict[str, Sequence[Any]] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """The stage's settings in the plan: rollout, update, kl, reward, …"""
        return self.context.settings

    @property
    def rollouts(self) -> int:
        """How many rollouts the recipe asks for."""
        return self.context.stage["batch"]["rollouts"]

    @cached_property
    def engines(self) -> Engines:
        """Actor, critic (of PPO), reference and reward, loaded and on DeepSpeed. Change the fields to use others."""
        return loop.make_engines(self.context)

    def trainer(self, engines: Engines | None = None) -> OnPolicy:
        """The stage's algorithm over `engines` (left out, those of the recipe).

        As in a run the actor's rollout engine has to pass the parity gate, or `generate` takes its place; the actor's
        `rollout_reason` says why. Every rank calls it. Raises UserError for an engine that lacks, and E0783 where the
        recipe says `on_mismatch = stop`.
        """
        engines = engines or self.engines
        if self.context.stage["kind"] == "ppo" and engines.critic is None:
            refuse("PPO has no critic", "`stage.engines.critic` is the one of the recipe; GRPO and RLOO learn without")
        check_reward(engines.reward)
        trainer = TRAINERS[self.context.stage["kind"]](
            engines, self.settings, at_once=self.context.stage["batch"]["generate_per_rank"],
            stop_ids=self.context.stop_ids, pad_id=self.context.pad_id, seed=self.context.seed,
        )  # fmt: skip
        rows = self._rows("train")
        found = pass_gate(trainer, rows[distributed.rank() :: distributed.world()] or rows)
        if "refused" in found and distributed.rank() == 0:
            logger.warning("rollout by %s: %s", found["engine"], found["reason"])
        return trainer

    def reward(self, function: Function, name: str | None = None) -> TextReward:
        """A reward from a function of two lists of text, prompts and answers, to a number for each answer."""
        name = name or getattr(function, "__name__", "reward")

        def decode(ids: list[int]) -> str:
            return self.context.tokenizer.decode(ids, skip_special_tokens=True)

        return TextReward(f"`{name}`", function, decode)

    def prompts(self, rollout: int) -> tuple[list[Prompt], list[int]]:
        """This rank's prompts of a rollout, and their numbers in the global batch, in the order of a run."""
        rows, count = self._rows("train"), self.context.stage["batch"]["prompts"]
        chosen = batch_rows(len(rows), count, rollout, self.context.seed, self.context.shuffles("train"))
        numbers = list(range(distributed.rank(), count, distributed.world()))
        return [rows[chosen[number]] for number in numbers], numbers

    def pretraining(self, rollout: int) -> list[list[Example]]:
        """This rank's pretraining rows for each update of a rollout, for `train_step`; [] without `ptx`."""
        rows = self._rows("ptx")
        return loop.ptx_rows(self.context, rows, rollout) if rows else []

    def _rows(self, edge: str) -> Sequence[Any]:
        """The rows of an edge, which are rendered and tokenised once."""
        if edge not in self._read:
            self._read[edge] = self.context.rows(edge)
        return self._read[edge]

    def evaluate(self, trainer: OnPolicy) -> dict[str, float]:
        """Score, KL and length of one answer to each held-out prompt, with the same noise at every call."""
        held_out = self._rows("eval")
        return summary(answer(trainer, held_out)) if held_out else {}

    def save(self, engine: Engine, name: str) -> Path:
        """Write an engine's model in Hugging Face form to `name` in the output; every rank calls it.

        A model that is there under that name is replaced. Raises UserError for a name that leads out of the output, and
        for one of something else.
        """
        check_engine(engine)
        check_name(self.context.directory, name)
        path = self.context.directory / name
        save_model(engine, self.context.tokenizer, path, stop_ids=self.context.stop_ids)
        return path
