"""Where the score of an answer comes from."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from rlhfdsl.engines.engine import ScalarEngine
from rlhfdsl.training.experience import Answers
from rlhfdsl.training.micro import micro_parts
from rlhfdsl.training.rollouts import read


class Reward(Protocol):
    """Scores answers [B] of one rank as fp32 [B]. Every rank calls it together."""

    def __call__(self, answers: Answers) -> Tensor: ...


class ModelReward:
    """A frozen reward model, read at the last real token.

    longest: tokens of a row at which the engine's micro batch was sized. The mean that the model was saved with is
    taken off; with `normalize` the rest is divided by the deviation it was saved with.
    """

    def __init__(self, engine: ScalarEngine, *, longest: int, normalize: bool = False):
        self.engine, self.longest = engine, longest
        config = engine.module.config
        self.mean = float(getattr(config, "reward_mean", 0.0))
        self.deviation = float(getattr(config, "reward_std", 1.0)) if normalize else 1.0

    def __call__(self, answers: Answers) -> Tensor:
        self.engine.eval()
        (parts,) = micro_parts(answers.lengths.tolist(), self.engine.micro, self.longest)
        scores = read(answers, parts, lambda part: self.engine.scores(part.ids, part.lengths))
        return (scores - self.mean) / self.deviation
