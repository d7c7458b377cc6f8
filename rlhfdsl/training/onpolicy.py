"""Learning from one's own answers: what PPO, GRPO and RLOO share.

A rollout: the actor samples answers to its prompts, actor, reference and reward read them, and the algorithm says what
each token is worth. Then `epochs` passes over the minibatches, each with one optimizer step. An algorithm is a subclass
that turns `Scored` answers into an `Experience`; one that trains more than an actor extends `gradients` and `trained`.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhfdsl.data.edge import Example, Prompt
from rlhfdsl.data.order import order
from rlhfdsl.engines import distributed
from rlhfdsl.engines.base import BasePolicy
from rlhfdsl.engines.distributed import all_sum
from rlhfdsl.engines.ema import MovingAverage
from rlhfdsl.engines.engine import Engine, PolicyEngine, ScalarEngine
from rlhfdsl.engines.hybrid import HybridEngine
from rlhfdsl.engines.rollout.interface import Rollout, Sampling
from rlhfdsl.engines.rollout.sampling import Distribution
from rlhfdsl.training import effort, invariants, rollouts
from rlhfdsl.training.advantages import next_kl_coefficient, overlong_penalty
from rlhfdsl.training.experience import Answers, Experience, Scored, as_answers
from rlhfdsl.training.handed import check_experience, check_prompts, check_ptx
from rlhfdsl.training.losses import kl_estimate
from rlhfdsl.training.micro import Passes, in_turn, micro_parts
from rlhfdsl.training.policy import policy_gradients, pretraining_gradients
from rlhfdsl.training.rewards import Reward, Weighted, models


@dataclass(slots=True)
class Engines:
    """The models of a stage: a policy that learns, the policy it is held to, what scores, and PPO's critic."""

    actor: HybridEngine
    ref: PolicyEngine | BasePolicy
    reward: Reward
    critic: ScalarEngine | None = None


class OnPolicy(ABC):
    """A loop over a set of engines: `generate_experience`, then `train_step`, once for each rollout.

    settings: the `settings` of the stage in the plan. at_once: sequences that one rank samples at a time (what its
    KV cache has room for). stop_ids end an answer; pad_id fills rows and decides nothing. average: of the actor's
    weights, where its plan has `ema`.
    """

    def __init__(
        self,
        engines: Engines,
        settings: dict[str, Any],
        *,
        at_once: int,
        stop_ids: tuple[int, ...],
        pad_id: int,
        seed: int,
    ):
        self.engines = engines
        self.settings = settings
        self.at_once = at_once
        self.stop_ids, self.pad_id, self.seed = stop_ids, pad_id, seed
        self.device = engines.actor.device
        self.kl_coefficient: float = settings["kl"]["coef"]
        self.rollouts = 0
        decay = engines.actor.spec["ema"]
        self.average = MovingAverage(engines.actor, decay) if decay is not None else None
        self.before: dict[str, Any] | None = None  # what the policy answered before the first update

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the engines, of this rank: tensors, numbers and dicts of them."""
        return {
            "kl_coefficient": self.kl_coefficient,
            "rollouts": self.rollouts,
            "average": self.average.shard if self.average is not None else {},
            "before": self.before,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.kl_coefficient, self.rollouts, self.before = state["kl_coefficient"], state["rollouts"], state["before"]
        for name, tensor in state["average"].items():
            self.average.shard[name].copy_(tensor)

    # -- what an algorithm decides ---------------------------------------------------------------------------------

    @abstractmethod
    def judged(self, scored: Scored) -> Experience:
        """What each token of the answers is worth: rewards and advantages (and values and returns)."""

    def trained(self, actor: bool) -> list[Engine]:
        """The engines that an update steps; `actor`: whether the actor learns too."""
        return [self.engines.actor] if actor else []

    def gradients(
        self, experience: Experience, number: int, pretraining: Sequence[Example], actor: bool
    ) -> list[Passes]:
        """What accumulates the gradients of minibatch `number`, for each trained engine."""
        if not actor:
            return []
        engine = self.engines.actor
        parts = self.parts(experience, engine)[number]
        passes = [policy_gradients(engine, experience, parts, self.settings, self.kl_coefficient)]
        if pretraining:
            weight = self.settings["ptx"]["weight"]
            passes.append(pretraining_gradients(engine, pretraining, weight, self.pad_id, self.longest))
        return passes

    # -- sampling and scoring --------------------------------------------------------------------------------------

    @property
    def temperature(self) -> float:
        return self.settings["rollout"]["temperature"]

    @property
    def distribution(self) -> Distribution:
        """What the tokens of answers are drawn from."""
        rollout = self.settings["rollout"]
        return Distribution(rollout["temperature"], rollout["top_k"], rollout["top_p"])

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with the longest answer, at which every micro batch was sized."""
        return self.settings["rollout"]["prompt"] + self.settings["rollout"]["answer"]

    def sample(self, prompts: Sequence[Prompt], rows: Sequence[int], rollout: int, answers: int) -> Rollout:
        """Sample `answers` answers to each prompt; `rows` are the prompts' numbers in the global batch.

        With `free_cache` the sampler's memory is given back: what reads the answers next was planned without it.
        """
        sampling = Sampling(
            max_new_tokens=self.settings["rollout"]["answer"],
            temperature=self.distribution.temperature,
            top_k=self.distribution.top_k or 0,
            top_p=self.distribution.top_p or 1.0,
            n_samples_per_prompt=answers,
            stop_ids=self.stop_ids,
            pad_id=self.pad_id,
            at_once=self.at_once,
        )
        actor = self.engines.actor
        sampled = rollouts.sample(actor, prompts, rows, sampling, seed=self.seed, rollout=rollout)
        if actor.spec["rollout"]["free_cache"]:
            actor.sampler.release()
        return sampled

    @torch.no_grad()
    def generate_experience(
        self, prompts: Sequence[Prompt], rows: Sequence[int]
    ) -> tuple[Experience, dict[str, float]]:
        """One rollout over this rank's `prompts`, whose numbers in the global batch are `rows`.

        Returns the experience and the rollout's metrics, the same on every rank. Raises UserError for prompts that the
        stage has no room for.
        """
        check_prompts(prompts, rows, self.settings["rollout"]["prompt"])
        started = time.perf_counter()
        sampled = self.sample(prompts, rows, self.rollouts, self.settings["rollout"]["answers"])
        generated = time.perf_counter()
        experience = self.judged(self.score(sampled))
        metrics = self.rollout_metrics(experience)
        metrics["seconds_generate"] = generated - started
        metrics["seconds_score"] = time.perf_counter() - generated
        metrics["generated_per_second"] = metrics["answers"] * metrics["length"] / metrics["seconds_generate"]
        metrics |= effort.rate("generate", self._sampling(experience), metrics["seconds_generate"], self.device)
        metrics |= effort.rate("score", self._reading(experience), metrics["seconds_score"], self.device)
        self.rollouts += 1
        return experience, metrics

    @torch.no_grad()
    def score(self, sampled: Rollout) -> Scored:
        """Read sampled answers with actor, reference and reward."""
        answers = as_answers(sampled, self.pad_id)
        log_probs = self._policies(answers)
        self.engines.ref.rest()
        reward = self.engines.reward
        terms = reward.terms(answers) if isinstance(reward, Weighted) else None
        scores = reward(answers).float() if terms is None else reward.total(terms)
        return Scored(
            **vars(answers), log_probs=log_probs[0], ref_log_probs=log_probs[1], scores=scores, score_terms=terms
        )

    def _policies(self, answers: Answers) -> Sequence[Tensor]:
        """Log-probabilities of the answers' tokens under actor and reference, [B, A] each."""
        actor, ref = self.engines.actor, self.engines.ref
        actor.eval()
        ref.eval()
        parts = [[rows for part in self.parts(answers, engine) for rows in part] for engine in (actor, ref)]
        if isinstance(ref, BasePolicy) and ref.joins:
            return rollouts.beside_base(ref, answers, parts[0], self.temperature)
        return [
            rollouts.read(answers, own, lambda part, e=engine: self._log_probs(e, part))
            for engine, own in zip((actor, ref), parts, strict=True)
        ]

    def parts(self, answers: Answers, engine: Engine | BasePolicy) -> list[list[Tensor]]:
        """The micro batches of each minibatch of the update.

        Scoring uses the same: so policy and old policy are compared between passes of one shape, and the ratio of the
        first update is 1 whatever the type. Only where it reads actor and reference in one pass (ZeRO 3 with LoRA),
        of rows twice, the two differ by rounding.
        """
        size = self.settings["update"]["minibatch"] // distributed.world()
        return micro_parts(answers.lengths.tolist(), engine, self.longest, size)

    def shaped(self, scored: Scored) -> Tensor:
        """Scores as the algorithm sees them, [B]: clipped, moved by `missing_eos` where the answer did not end, and
        less the penalty of a long answer."""
        reward, scores = self.settings["reward"], scored.scores
        if reward["clip"] is not None:
            scores = scores.clamp(-reward["clip"], reward["clip"])
        scores = scores + reward["missing_eos"] * ~scored.ended
        if reward["overlong"] is not None:
            longest, lengths = self.settings["rollout"]["answer"], scored.mask.sum(1)
            scores = scores - overlong_penalty(lengths, longest, **reward["overlong"])
        return scores

    def penalty(self, scored: Scored) -> Tensor:
        """The KL estimate that is taken off the reward at each token, [B, A]; 0 where the KL is in the loss."""
        kl = self.settings["kl"]
        if kl["apply"] == "loss":
            return torch.zeros_like(scored.log_probs)
        return kl_estimate(scored.log_probs, scored.ref_log_probs, kl["estimator"])

    def _log_probs(self, engine: PolicyEngine | BasePolicy, part: Any) -> Tensor:
        return rollouts.answer_statistics(engine, part, self.temperature)[0]

    def rollout_metrics(self, experience: Experience) -> dict[str, float]:
        """Means over the answers (or their tokens) of all ranks."""
        mask = experience.mask
        kl = kl_estimate(experience.log_probs, experience.ref_log_probs, "k1") * mask
        gap = (experience.rollout_log_probs - experience.log_probs).abs() * mask
        clip = self.settings["reward"]["clip"]
        clipped = experience.scores.abs() > (math.inf if clip is None else clip)
        scores = experience.scores.double()  # of large ones that differ little, fp32 squares would hide the deviation
        per_answer = [
            torch.ones_like(scores), scores, scores.square(), kl.sum(1), mask.sum(1), experience.ended, clipped,
            gap.sum(1), experience.rewards.sum(1),
        ]  # fmt: skip
        sums = all_sum(torch.stack([each.double().sum() for each in per_answer])).tolist()
        count, score, square, kl_sum, tokens, ended, clips, parity, reward = sums
        metrics = {
            "answers": count,
            "score": score / count,
            "score_std": math.sqrt(max(square / count - (score / count) ** 2, 0.0)),
            "reward": reward / count,
            "kl": kl_sum / count,
            "kl_per_token": kl_sum / tokens,
            "kl_coefficient": self.kl_coefficient,
            "length": tokens / count,
            "ended": ended / count,
            "score_clipped": clips / count,
            "parity": parity / tokens,
        }
        if experience.score_terms is not None:
            means = (all_sum(experience.score_terms.double().sum(0)) / count).tolist()
            for name, mean in zip(self.engines.reward.names, means, strict=True):
                # Beside a reward model, or a metric of that name, a scorer has its whole address.
                metrics[f"score_{name}" if f"score_{name}" not in metrics else f"score_scorer.{name}"] = mean
        return metrics

    # -- effective FLOP/s ------------------------------------------------------------------------------------------

    def _sampling(self, answers: Answers) -> Tensor:
        return effort.sampling(self.engines.actor, answers.prompt_lengths.double(), answers.lengths.double())

    def _reading(self, answers: Answers) -> Tensor:
        engines = self.engines
        readers = [engines.actor, engines.ref, *(reward.engine for reward in models(engines.reward))]
        readers += [engines.critic] if engines.critic is not None else []
        lengths = answers.lengths.double()
        return sum(effort.reading(engine, lengths, lengths - answers.prompt_lengths) for engine in readers)

    def _learning(self, answers: Answers, ptx: Sequence[Sequence[Example]], actor: bool) -> Tensor:
        """Of all updates of a rollout."""
        lengths = answers.lengths.double()
        said = lengths - answers.prompt_lengths
        whole = sum(effort.learning(engine, lengths, said) for engine in self.trained(actor))
        whole = self.settings["update"]["epochs"] * whole
        if actor and ptx:
            rows = effort.tokens_of(len(row.ids) for rows in ptx for row in rows)
            whole = whole + effort.learning(self.engines.actor, rows.to(lengths.device))
        return whole

    # -- learning --------------------------------------------------------------------------------------------------

    def train_step(
        self, experience: Experience, ptx: Sequence[Sequence[Example]] = (), *, actor: bool = True
    ) -> dict[str, float]:
        """All updates of one rollout: `epochs` passes over its minibatches.

        ptx: this rank's pretraining rows for each update, if the stage mixes them in. actor: whether the actor learns
        too (not while a critic warms up). Returns the mean metrics of the updates. Raises UserError for an experience
        that is not whole minibatches.
        """
        started = time.perf_counter()
        update = self.settings["update"]
        minibatch = update["minibatch"] // distributed.world()
        check_experience(experience, minibatch, critic=self.engines.critic is not None)
        count = len(experience) // minibatch
        check_ptx(ptx, self.settings, update["epochs"] * count)
        history: list[dict[str, float]] = []
        for epoch in range(update["epochs"]):
            for number in order(count, self.seed, self.rollouts * update["epochs"] + epoch, shuffle=True):
                pretraining = ptx[len(history)] if ptx else ()
                metrics = in_turn(self.gradients(experience, number, pretraining, actor))
                history.append(metrics | self._step(actor))
        if actor:  # a coefficient that moves nothing is not moved
            self._steer(experience)
        mean = {key: sum(m[key] for m in history) / len(history) for key in history[0]}
        seconds = time.perf_counter() - started
        rate = effort.rate("train", self._learning(experience, ptx, actor), seconds, self.device)
        return mean | {"seconds_train": seconds} | rate

    def _step(self, actor: bool) -> dict[str, float]:
        """One optimizer step of every trained engine.

        In fp16 an engine whose gradients overflowed skips its step; then the others skip theirs too, so that actor and
        critic have always learned from the same answers.
        """
        names = ((self.engines.critic, "critic"), (self.engines.actor, "actor"))
        trained = [(engine, name) for engine, name in names if engine in self.trained(actor)]
        overflows = [engine.overflows() for engine, _ in trained]
        metrics: dict[str, float] = {}
        for (engine, name), overflow in zip(trained, overflows, strict=True):
            step = engine.skip() if any(overflows) and not overflow else engine.step()
            metrics |= {f"{name}_lr": step["lr"], f"{name}_grad_norm": step["grad_norm"]}
        if self.engines.actor.spec["dtype"] == "fp16":
            metrics["overflow"] = float(any(overflows))
        if actor and self.average is not None and not any(overflows):
            self.average.update()
        return metrics

    def _steer(self, experience: Experience) -> None:
        """Move an adaptive KL coefficient towards its target."""
        kl = self.settings["kl"]
        if kl["target"] is None:
            return
        sums = torch.stack([
            (experience.log_probs - experience.ref_log_probs).sum(),
            torch.tensor(float(len(experience)), device=self.device),
        ])  # fmt: skip
        total, count = all_sum(sums).tolist()
        self.kl_coefficient = next_kl_coefficient(
            self.kl_coefficient, total / count, kl["target"], kl["horizon"], int(count)
        )

    # -- checks ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check(self, experience: Experience, same_reference: bool) -> dict[str, float]:
        """The invariants of step 0, on the first micro batch of the first rollout. Raises UserError."""
        actor = self.engines.actor
        part = experience.take(self.parts(experience, actor)[0][0])
        actor.train()
        again = self._log_probs(actor, part)
        dtype = actor.spec["dtype"]
        found = {"ratio": invariants.ratio_is_one(part.log_probs, again, part.mask, dtype)}
        if same_reference:
            found["reference"] = invariants.reference_agrees(part.log_probs, part.ref_log_probs, part.mask, dtype)
        for reward in models(self.engines.reward):
            part = experience.rows(0, reward.engine.micro)
            padded = torch.nn.functional.pad(part.ids, (0, 7), value=self.pad_id)
            drift = invariants.padding_is_ignored(
                reward.engine.scores(part.ids, part.lengths, part.total),
                reward.engine.scores(padded, part.lengths),
                reward.engine.spec["dtype"],
            )
            reward.engine.rest()
            found["padding"] = max(drift, found.get("padding", 0.0))
        return {f"invariant_{name}": value for name, value in found.items()}
