"""A PPO loop of one's own: the recipe gives models, data and settings, this file what happens when.

    python own_loop.py                        one process
    torchrun --nproc-per-node 2 own_loop.py   two ranks

It pays for answers made of letters, stops early when the policy is good enough, and halves the KL's factor on the way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

HERE = Path(__file__).parent


def letters(prompts: list[str], answers: list[str]) -> list[float]:
    """The share of an answer's characters that are lower-case letters."""
    return [sum("a" <= c <= "z" for c in answer) / max(len(answer), 1) for answer in answers]


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, print a line for each rollout, save the policy; returns the mean score of each rollout."""
    from rlhfdsl.api import open_stage
    from rlhfdsl.engines import distributed

    parser = argparse.ArgumentParser()
    parser.add_argument("--rollouts", default="40")
    parser.add_argument("--output", default="runs/own-loop/own")
    options = parser.parse_args(arguments)
    params = {"rollouts": options.rollouts}
    stage = open_stage(HERE / "own.rlhf", "stage.ppo", params=params, output=options.output)

    engines = stage.engines
    engines.reward = stage.reward(letters)
    trainer = stage.trainer(engines)
    scores = []
    for rollout in range(stage.rollouts):
        prompts, numbers = stage.prompts(rollout)
        experience, metrics = trainer.generate_experience(prompts, numbers)
        if rollout == 0:
            trainer.check(experience, same_reference=True)
        metrics |= trainer.train_step(experience)
        scores.append(metrics["score"])
        if distributed.rank() == 0:
            print(f"{rollout + 1:3d}  score {metrics['score']:.3f}  kl {metrics['kl']:.2f}")
        if metrics["score"] > 0.9:
            break
        if rollout == 20:
            trainer.kl_coefficient /= 2
    stage.save(engines.actor, "policy")
    return scores


if __name__ == "__main__":
    main()
