"""Sampling answers, and reading them with models in micro batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from rlhfdsl.data.edge import Prompt
from rlhfdsl.engines.base import BasePolicy, BesideBase
from rlhfdsl.engines.engine import PolicyEngine, ScalarEngine
from rlhfdsl.engines.hybrid import HybridEngine
from rlhfdsl.engines.rollout.interface import Prompts, Rollout, Sampling, left_padded
from rlhfdsl.engines.rollout.sampling import row_seeds
from rlhfdsl.models.inputs import length_mask
from rlhfdsl.training.experience import Answers, at_answers
from rlhfdsl.training.reading import Targets, target_statistics


def sample(
    actor: HybridEngine, prompts: Sequence[Prompt], rows: Sequence[int], sampling: Sampling, *, seed: int, rollout: int
) -> Rollout:
    """Sample answers to each prompt.

    rows: the prompts' numbers in the global batch. With `seed` and `rollout` they decide the noise, so an answer does
    not depend on its neighbours or its rank.
    """
    answers = sampling.n_samples_per_prompt
    ids, mask = left_padded([prompt.ids for prompt in prompts], sampling.pad_id)
    numbers = torch.tensor(rows).unsqueeze(1) * answers + torch.arange(answers)
    request = Prompts(
        prompt_ids=ids.to(actor.device),
        prompt_attention_mask=mask.to(actor.device),
        seeds=row_seeds(seed, rollout, numbers.flatten()).to(actor.device),
    )
    actor.pulse(f"{actor.name}: sampling")
    return actor.generate(request, sampling)


def answer_targets(part: Answers) -> Targets:
    """The tokens of the answers."""
    width = part.ids.shape[1]
    return Targets.of(length_mask(part.lengths, width) & ~length_mask(part.prompt_lengths, width))


def answer_statistics(
    engine: PolicyEngine | BasePolicy | BesideBase,
    part: Answers,
    temperature: float,
    targets: Targets | None = None,
) -> tuple[Tensor, Tensor]:
    """Log p of the answers' tokens given those before them, and the entropy of each: [b, A], 0 outside the mask.

    targets: `answer_targets(part)` where it was made before.
    """
    targets = answer_targets(part) if targets is None else targets
    log_probs, entropies = target_statistics(engine, part.ids, part.lengths, targets, temperature, part.total)
    return tuple(at_answers(x[:, 1:], part.prompt_lengths, part.mask) for x in (log_probs, entropies))


def answer_values(engine: ScalarEngine, part: Answers) -> Tensor:
    """The scalar of the state before each answer token, [b, A], 0 outside the mask."""
    return at_answers(engine.scalars(part.ids, part.lengths, part.total), part.prompt_lengths, part.mask)


def beside_base(
    base: BasePolicy, answers: Answers, parts: Sequence[Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    """Log p of the answers' tokens under an engine's policy and under its base, [B, A] each: every micro batch of
    `parts` is read once, with its rows twice."""
    count = len(answers)
    twice = answers.take(torch.arange(count).repeat(2))
    both = BesideBase(base)
    log_probs = read(
        twice, [torch.cat([rows, rows + count]) for rows in parts],
        lambda part: answer_statistics(both, part, temperature)[0],
    )  # fmt: skip
    return log_probs[:count], log_probs[count:]


@torch.no_grad()
def read(answers: Answers, parts: Iterable[Tensor], function: Callable[[Answers], Tensor]) -> Tensor:
    """`function` over micro batches of `answers`, put back in their order: [B] or [B, A].

    parts: row numbers of each micro batch; function: a part of the answers to [b], or [b, its own A].
    """
    whole: Tensor | None = None
    # taken before the first pass, since taking rows waits for the device
    for rows, part in [(rows.to(answers.ids.device), answers.take(rows)) for rows in parts]:
        found = function(part)
        if whole is None:
            shape = answers.mask.shape if found.dim() == 2 else answers.mask.shape[:1]
            whole = torch.zeros(shape, dtype=found.dtype, device=found.device)
        if found.dim() == 2:
            whole[rows, : found.shape[1]] = found
        else:
            whole[rows] = found
    assert whole is not None, "no rows"
    return whole
