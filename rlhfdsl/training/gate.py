"""The parity gate of a stage that learns from its own answers, before anything is measured or learned.

A few answers are sampled by the actor's rollout engine and read twice more: by the training forward, which scores every
answer of the run, and by `generate`. An engine whose log-probabilities are further from the scores than `generate`'s,
or whose tokens are not those that `generate` draws by the same noise, is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhfdsl.data.edge import Prompt
from rlhfdsl.engines import distributed
from rlhfdsl.engines.rollout import parity
from rlhfdsl.engines.rollout.eager import EagerSampler
from rlhfdsl.engines.rollout.interface import Rollout
from rlhfdsl.language.diagnostics import UserError, first_line
from rlhfdsl.training import rollouts
from rlhfdsl.training.experience import as_answers
from rlhfdsl.training.micro import micro_parts
from rlhfdsl.training.onpolicy import OnPolicy

ROWS = 8  # answers that are compared; sampled among a whole batch, so that every kind of slot is in use
TOKENS = 128  # of each answer; `generate` is slow, and a fault shows in the first tokens
GATE = (1 << 40) + 1  # rollout number of the gate's noise, apart from training's and the evaluation's


@torch.no_grad()
def pass_gate(trainer: OnPolicy, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Compare the actor's rollout engine with `generate`, unless it is `generate`; fall back to that on a mismatch.

    prompts: this rank's, at least one. Every rank calls it, and one rank's mismatch is everyone's. Returns what the
    stage reports: engine, reason, and the differences in nats. Raises UserError E0783 where the recipe says
    `on_mismatch = stop`.
    """
    actor = trainer.engines.actor
    if actor.sampler.name == "eager":
        return {"engine": "eager", "reason": actor.rollout_reason}
    sampled, failure = _sampled(trainer, prompts)
    if not _everywhere(trainer, failure is None):
        return _refuse(trainer, f"cannot sample here: {failure or 'so another rank says'}", {})
    found = _compare(trainer, sampled)
    differences = {"rollout_mean": found.rollout_mean, "rollout_p99": found.rollout_p99,
                   "eager_mean": found.eager_mean, "eager_p99": found.eager_p99,
                   "behind_mean": found.behind_mean}  # fmt: skip
    if not _everywhere(trainer, found.holds):
        return _refuse(trainer, f"does not sample from the policy that is trained: {found}", differences)
    return {"engine": actor.sampler.name, "reason": actor.rollout_reason, **differences}


def _everywhere(trainer: OnPolicy, holds: bool) -> bool:
    """Whether it holds on every rank."""
    return bool(distributed.all_sum(torch.tensor(float(holds), device=trainer.device)) == distributed.world())


def _refuse(trainer: OnPolicy, why: str, differences: dict[str, float]) -> dict[str, Any]:
    actor = trainer.engines.actor
    refused = actor.sampler.name
    if trainer.settings["rollout"]["on_mismatch"] == "stop":
        raise UserError(
            "E0783", f"the rollout engine `{refused}` {why}",
            help="`engine = eager` in the `rollout` block samples with the model's own `generate`",
        )  # fmt: skip
    actor.fall_back(f"`{refused}` {why}")
    return {"engine": actor.sampler.name, "reason": actor.rollout_reason, "refused": refused, **differences}


def _sampled(trainer: OnPolicy, prompts: Sequence[Prompt]) -> tuple[Rollout | None, str | None]:
    """A batch of answers, or why there is none: a machine without a compiler, say, on which no kernel can be made."""
    chosen = [prompts[i % len(prompts)] for i in range(min(trainer.at_once, max(len(prompts), ROWS)))]
    try:
        return trainer.sample(chosen, list(range(len(chosen))), GATE, 1), None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever Triton, torch.compile or a model's own code says
        return None, first_line(error)


def _compare(trainer: OnPolicy, rollout: Rollout) -> parity.Parity:
    actor = trainer.engines.actor
    sampled = parity.first_tokens(parity.some_rows(rollout, ROWS), TOKENS)
    eager, behind = EagerSampler(actor).read(sampled, trainer.distribution)
    answers = as_answers(sampled, trainer.pad_id)
    actor.eval()
    (parts,) = micro_parts(answers.lengths.tolist(), actor, trainer.longest, len(answers))
    scored = rollouts.read(
        answers, parts, lambda part: rollouts.answer_statistics(actor, part, trainer.temperature)[0]
    )
    width = answers.mask.shape[1]
    return parity.compare(
        sampled.log_probs[:, :width], eager[:, :width], scored, behind[:, :width], answers.mask, actor.spec["dtype"]
    )
