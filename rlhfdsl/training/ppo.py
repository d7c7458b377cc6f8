"""PPO from human feedback: sample answers, score them, update actor and critic.

Ouyang et al. 2022, step 3, with the details of Huang et al. (2023, 2024). One rollout: the actor samples an answer to
every prompt; actor, reference, critic and reward model read it; the reward is the score of the whole answer minus a KL
penalty at every token; advantages are whitened over all ranks; then `epochs` passes over the minibatches, each with one
optimizer step of the actor (PPO and ptx gradients together) and one of the critic.

Not here yet: LoRA, rewards from a function or an endpoint, several rewards.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhfdsl.data.collate import collate
from rlhfdsl.data.edge import Example, Prompt
from rlhfdsl.data.order import batch_rows, order
from rlhfdsl.engines import distributed
from rlhfdsl.engines.artifacts import save_model
from rlhfdsl.engines.distributed import all_sum
from rlhfdsl.engines.ema import MovingAverage
from rlhfdsl.engines.engine import PolicyEngine, ScalarEngine
from rlhfdsl.engines.hybrid import HybridEngine
from rlhfdsl.engines.rollout.interface import Prompts, Rollout, Sampling, left_padded
from rlhfdsl.engines.rollout.sampling import row_seeds
from rlhfdsl.training import invariants
from rlhfdsl.training.advantages import (
    advantages_and_returns,
    explained_variance,
    next_kl_coefficient,
    token_rewards,
    whiten,
)
from rlhfdsl.training.context import Context, due, micro_batches
from rlhfdsl.training.experience import Experience, answer_mask, at_answers, joined
from rlhfdsl.training.losses import (
    entropies,
    kl_estimate,
    policy_loss,
    selected_log_probs,
    token_mean,
    value_loss,
)
from rlhfdsl.training.sft import supervised_tokens, token_loss

EVALUATION = 1 << 40  # rollout number of the evaluation's noise, apart from every training rollout's


@dataclass
class Engines:
    """The four models of PPO."""

    actor: HybridEngine
    critic: ScalarEngine
    ref: PolicyEngine
    reward: ScalarEngine


class Trainer:
    """PPO over a set of engines: `generate_experience`, then `train_step`.

    settings: the `settings` of a ppo stage in the plan. at_once: sequences that one rank samples at a time (what its
    KV cache has room for). stop_ids end an answer; pad_id fills rows and decides nothing.
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
        self.average: MovingAverage | None = None
        config = engines.reward.module.config
        self.reward_mean = float(getattr(config, "reward_mean", 0.0))
        self.reward_std = float(getattr(config, "reward_std", 1.0)) if settings["reward"]["normalize"] else 1.0

    @property
    def temperature(self) -> float:
        return self.settings["rollout"]["temperature"]

    # -- sampling and scoring ------------------------------------------------------------------------------------

    def sample(self, prompts: Sequence[Prompt], rows: Sequence[int], rollout: int, answers: int) -> list[Rollout]:
        """Sample `answers` answers to each prompt; `rows` are the prompts' numbers in the global batch.

        Returns one `Rollout` for each `at_once` sequences.
        """
        sampling = Sampling(
            max_new_tokens=self.settings["rollout"]["answer"],
            temperature=self.temperature,
            n_samples_per_prompt=answers,
            stop_ids=self.stop_ids,
            pad_id=self.pad_id,
        )
        rollouts = []
        for chosen in micro_batches(range(len(prompts)), max(self.at_once // answers, 1)):
            ids, mask = left_padded([prompts[i].ids for i in chosen], self.pad_id)
            numbers = torch.tensor([rows[i] for i in chosen]).unsqueeze(1) * answers + torch.arange(answers)
            request = Prompts(
                prompt_ids=ids.to(self.device),
                prompt_attention_mask=mask.to(self.device),
                seeds=row_seeds(self.seed, rollout, numbers.flatten()).to(self.device),
            )
            rollouts.append(self.engines.actor.generate(request, sampling))
        return rollouts

    @torch.no_grad()
    def generate_experience(
        self, prompts: Sequence[Prompt], rows: Sequence[int]
    ) -> tuple[Experience, dict[str, float]]:
        """One rollout over this rank's `prompts`, whose numbers in the global batch are `rows`.

        Returns the experience and the rollout's metrics, the same on every rank.
        """
        started = time.perf_counter()
        rollouts = self.sample(prompts, rows, self.rollouts, self.settings["rollout"]["answers"])
        sampled = time.perf_counter()
        experience = self.score(rollouts)
        metrics = self._rollout_metrics(experience)
        metrics["seconds_generate"] = sampled - started
        metrics["seconds_score"] = time.perf_counter() - sampled
        metrics["generated_per_second"] = metrics["answers"] * metrics["length"] / metrics["seconds_generate"]
        self.rollouts += 1
        return experience, metrics

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> Experience:
        """Read sampled answers with all four models and turn them into rewards and advantages."""
        parts = [rollout.right_padded(self.pad_id) for rollout in rollouts]
        ids = joined([part[0] for part in parts], self.pad_id)
        prompt_lengths, lengths = (torch.cat([part[i] for part in parts]) for i in (1, 2))
        ended = torch.cat([rollout.ended for rollout in rollouts])
        mask = answer_mask(prompt_lengths, lengths)
        rollout_log_probs = joined([rollout.log_probs for rollout in rollouts], 0)[:, : mask.shape[1]]
        engines = self.engines
        for engine in (engines.actor, engines.critic, engines.ref, engines.reward):
            engine.eval()
        log_probs = at_answers(self._log_probs(engines.actor, ids, lengths), prompt_lengths, mask)
        ref_log_probs = at_answers(self._log_probs(engines.ref, ids, lengths), prompt_lengths, mask)
        values = at_answers(_per_token(engines.critic, ids, lengths), prompt_lengths, mask)
        raw = torch.cat([
            engines.reward.scores(*_trimmed(ids, lengths, start, engines.reward.micro))
            for start in range(0, len(ids), engines.reward.micro)
        ])  # fmt: skip
        scores = (raw - self.reward_mean) / self.reward_std
        kl = self.settings["kl"]
        penalty = torch.zeros_like(log_probs)
        if kl["apply"] == "reward":
            penalty = kl_estimate(log_probs, ref_log_probs, kl["estimator"])
        rewards = token_rewards(self._shaped(scores, ended), penalty, mask, self.kl_coefficient)
        update = self.settings["update"]
        advantages, returns = advantages_and_returns(rewards, values, mask, update["gamma"], update["lambda"])
        if update["whiten"]:
            advantages = whiten(advantages, mask, all_sum)
        return Experience(
            ids=ids, prompt_lengths=prompt_lengths, lengths=lengths, ended=ended, mask=mask,
            rollout_log_probs=rollout_log_probs, log_probs=log_probs, ref_log_probs=ref_log_probs,
            values=values, scores=scores, rewards=rewards, advantages=advantages, returns=returns,
        )  # fmt: skip

    def _shaped(self, scores: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
        """Scores as PPO sees them, [B]: clipped, and moved by `missing_eos` where the answer did not end."""
        reward = self.settings["reward"]
        if reward["clip"] is not None:
            scores = scores.clamp(-reward["clip"], reward["clip"])
        return scores + reward["missing_eos"] * ~ended

    def _log_probs(self, engine: PolicyEngine, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """log p of every token given those before it, [B, T - 1], in micro batches."""
        whole = ids.new_zeros(ids.shape[0], ids.shape[1] - 1, dtype=torch.float32)
        for start in range(0, len(ids), engine.micro):
            part, part_lengths = _trimmed(ids, lengths, start, engine.micro)
            logits = engine.logits(part, part_lengths)[:, :-1]
            log_probs = selected_log_probs(logits, part[:, 1:], self.temperature)
            whole[start : start + engine.micro, : log_probs.shape[1]] = log_probs
        return whole

    def _rollout_metrics(self, experience: Experience) -> dict[str, float]:
        """Means over the answers (or their tokens) of all ranks."""
        mask = experience.mask
        kl = kl_estimate(experience.log_probs, experience.ref_log_probs, "k1") * mask
        gap = (experience.rollout_log_probs - experience.log_probs).abs() * mask
        clip = self.settings["reward"]["clip"]
        clipped = experience.scores.abs() > (math.inf if clip is None else clip)
        per_answer = torch.stack([
            torch.ones_like(experience.scores), experience.scores, experience.scores.square(), kl.sum(1),
            mask.sum(1).float(), experience.ended.float(), clipped.float(), gap.sum(1), experience.rewards.sum(1),
        ])  # fmt: skip
        sums = all_sum(per_answer.double().sum(1)).tolist()
        count, score, square, kl_sum, tokens, ended, clips, parity, reward = sums
        return {
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
            "explained_variance": explained_variance(experience.values, experience.returns, mask, all_sum),
        }

    # -- learning ------------------------------------------------------------------------------------------------

    def train_step(
        self, experience: Experience, ptx: Sequence[Sequence[Example]] = (), *, actor: bool = True
    ) -> dict[str, float]:
        """All updates of one rollout: `epochs` passes over its minibatches.

        ptx: this rank's pretraining rows for each update, if the stage mixes them in. actor: whether the actor learns
        too (not while the critic warms up). Returns the mean metrics of the updates.
        """
        started = time.perf_counter()
        update, world = self.settings["update"], distributed.world()
        size = update["minibatch"] // world
        minibatches = [experience.rows(start, start + size) for start in range(0, len(experience), size)]
        history: list[dict[str, float]] = []
        for epoch in range(update["epochs"]):
            for number in order(len(minibatches), self.seed, self.rollouts * update["epochs"] + epoch, shuffle=True):
                pretraining = ptx[len(history)] if ptx else ()
                metrics = self._update_critic(minibatches[number])
                if actor:
                    metrics |= self._update_actor(minibatches[number], pretraining)
                history.append(metrics)
        kl = self.settings["kl"]
        if kl["target"] is not None:
            sums = torch.stack([
                (experience.log_probs - experience.ref_log_probs).sum(),
                torch.tensor(float(len(experience)), device=self.device),
            ])  # fmt: skip
            total, count = all_sum(sums).tolist()
            self.kl_coefficient = next_kl_coefficient(
                self.kl_coefficient, total / count, kl["target"], kl["horizon"], int(count)
            )
        mean = {key: sum(m[key] for m in history) / len(history) for key in history[0]}
        return mean | {"seconds_train": time.perf_counter() - started}

    def _update_actor(self, minibatch: Experience, pretraining: Sequence[Example]) -> dict[str, float]:
        engine, settings, world = self.engines.actor, self.settings, distributed.world()
        update, kl = settings["update"], settings["kl"]
        engine.train()
        tokens = all_sum(minibatch.mask.sum().float())
        sums = torch.zeros(6, device=self.device, dtype=torch.float64)
        for start in range(0, len(minibatch), engine.micro):
            part = minibatch.rows(start, start + engine.micro)
            mask = part.mask
            logits = engine.logits(part.ids, part.lengths)[:, :-1]
            log_probs = at_answers(
                selected_log_probs(logits, part.ids[:, 1:], self.temperature), part.prompt_lengths, mask
            )
            losses, clipped = policy_loss(
                log_probs, part.log_probs, part.advantages, update["clip"], update["dual_clip"]
            )
            surrogate = losses.detach()
            if kl["apply"] == "loss":
                losses = losses + self.kl_coefficient * kl_estimate(log_probs, part.ref_log_probs, kl["estimator"])
            with torch.set_grad_enabled(update["entropy"] != 0):
                entropy = at_answers(entropies(logits, self.temperature), part.prompt_lengths, mask)
            if update["entropy"]:
                losses = losses - update["entropy"] * entropy
            engine.backward(token_mean(losses, mask, tokens, world))
            log_ratio = (log_probs - part.log_probs).detach()
            sums += torch.stack([
                (surrogate * mask).sum(), (clipped & mask).sum(), (entropy.detach() * mask).sum(),
                (kl_estimate(part.log_probs, log_probs.detach(), "k3") * mask).sum(),
                (log_ratio.exp() * mask).sum(), mask.sum(),
            ]).double()  # fmt: skip
        ptx_loss = self._pretrain(pretraining) if pretraining else None
        step = engine.step()
        if self.average is not None:
            self.average.update()
        loss, clips, entropy_sum, approximate_kl, ratio, count = all_sum(sums).tolist()
        metrics = {
            "policy_loss": loss / count,
            "clipped": clips / count,
            "entropy": entropy_sum / count,
            "approximate_kl": approximate_kl / count,
            "ratio": ratio / count,
            "actor_lr": step["lr"],
            "actor_grad_norm": step["grad_norm"],
        }
        return metrics if ptx_loss is None else metrics | {"ptx_loss": ptx_loss}

    def _pretrain(self, rows: Sequence[Example]) -> float:
        """Add weight x the token-mean loss of pretraining rows to the actor's gradients; returns that loss."""
        engine, weight = self.engines.actor, self.settings["ptx"]["weight"]
        tokens = supervised_tokens(rows, self.device)
        total = torch.zeros((), device=self.device)
        for part in micro_batches(rows, engine.micro):
            loss = token_loss(engine, collate(part, self.pad_id).to(self.device), tokens)
            engine.backward(weight * loss)
            total += loss.detach()
        return all_sum(total).item() / distributed.world()

    def _update_critic(self, minibatch: Experience) -> dict[str, float]:
        engine, update, world = self.engines.critic, self.settings["update"], distributed.world()
        engine.train()
        tokens = all_sum(minibatch.mask.sum().float())
        sums = torch.zeros(2, device=self.device, dtype=torch.float64)
        for start in range(0, len(minibatch), engine.micro):
            part = minibatch.rows(start, start + engine.micro)
            values = at_answers(engine.scalars(part.ids, part.lengths), part.prompt_lengths, part.mask)
            losses, clipped = value_loss(values, part.values, part.returns, update["value_clip"])
            engine.backward(update["value_weight"] * token_mean(losses, part.mask, tokens, world))
            sums += torch.stack([(losses.detach() * part.mask).sum(), (clipped & part.mask).sum()]).double()
        step = engine.step()
        loss, clips = (all_sum(sums) / tokens).tolist()
        return {
            "value_loss": loss,
            "value_clipped": clips,
            "critic_lr": step["lr"],
            "critic_grad_norm": step["grad_norm"],
        }

    # -- checks and evaluation -----------------------------------------------------------------------------------

    @torch.no_grad()
    def check(self, experience: Experience, same_reference: bool) -> dict[str, float]:
        """The invariants of step 0, on the first micro batch of the first rollout. Raises UserError."""
        engines = self.engines
        part = experience.rows(0, engines.actor.micro)
        engines.actor.train()
        logits = engines.actor.logits(part.ids, part.lengths)[:, :-1]
        again = at_answers(
            selected_log_probs(logits, part.ids[:, 1:], self.temperature), part.prompt_lengths, part.mask
        )
        dtype = engines.actor.spec["dtype"]
        found = {"ratio": invariants.ratio_is_one(part.log_probs, again, part.mask, dtype)}
        if same_reference:
            found["reference"] = invariants.reference_agrees(part.log_probs, part.ref_log_probs, part.mask, dtype)
        part = experience.rows(0, engines.reward.micro)
        padded = torch.nn.functional.pad(part.ids, (0, 7), value=self.pad_id)
        found["padding"] = invariants.padding_is_ignored(
            engines.reward.scores(part.ids, part.lengths),
            engines.reward.scores(padded, part.lengths),
            engines.reward.spec["dtype"],
        )
        return {f"invariant_{name}": value for name, value in found.items()}

    @torch.no_grad()
    def answer(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """One sampled answer to every prompt with the same noise at every call.

        Returns scores, kl, lengths [N] and ended [N] in prompt order on every rank, and this rank's texts by row.
        """
        dealt, own = distributed.my_rows(len(prompts))
        gathered: list[torch.Tensor] = []
        answers: dict[int, list[int]] = {}
        size = max(self.settings["rollout"]["batch"] // distributed.world(), 1)
        for rows in micro_batches(dealt, size):
            experience = self.score(self.sample([prompts[i] for i in rows], rows, EVALUATION, 1))
            kl = kl_estimate(experience.log_probs, experience.ref_log_probs, "k1") * experience.mask
            gathered.append(
                torch.stack(
                    [experience.scores, kl.sum(1), experience.mask.sum(1), experience.ended.float()], 1
                )
            )
            for row, ids, start, end in zip(
                rows, experience.ids, experience.prompt_lengths, experience.lengths, strict=True
            ):
                answers[row] = ids[start:end].tolist()
        whole = distributed.spread(torch.cat(gathered)[:own].double(), dealt[:own], len(prompts)).cpu()
        return {
            "scores": whole[:, 0], "kl": whole[:, 1], "lengths": whole[:, 2], "ended": whole[:, 3], "ids": answers,
        }  # fmt: skip


def run(context: Context) -> dict[str, float]:
    """Train actor and critic of a `ppo` stage, evaluate against the policy it started from, and save both."""
    engines = Engines(
        actor=context.engine("actor", HybridEngine),
        critic=context.engine("critic", ScalarEngine),
        ref=context.engine("ref", PolicyEngine),
        reward=context.engine("reward", ScalarEngine),
    )
    settings, batch = context.settings, context.stage["batch"]
    trainer = Trainer(
        engines, settings, at_once=batch["generate_per_rank"],
        stop_ids=context.stop_ids, pad_id=context.pad_id, seed=context.seed,
    )  # fmt: skip
    decay = engines.actor.spec["ema"]
    if decay is not None:
        trainer.average = MovingAverage(engines.actor, decay)
    prompts, held_out, texts = context.rows("train"), context.rows("eval"), context.rows("ptx")
    world, rank = distributed.world(), distributed.rank()

    before = trainer.answer(held_out) if held_out else None
    if before:
        context.report("eval", update=0, of=batch["rollouts"], **summary(before))
    for rollout in range(batch["rollouts"]):
        chosen = batch_rows(len(prompts), batch["prompts"], rollout, context.seed, context.shuffles("train"))
        rows = list(range(rank, batch["prompts"], world))
        experience, metrics = trainer.generate_experience([prompts[chosen[i]] for i in rows], rows)
        if rollout == 0:
            same = context.weights_of("actor") == context.weights_of("ref")
            context.report("invariants", **trainer.check(experience, same))
        pretraining = ptx_rows(context, texts, rollout) if texts else ()
        learns = rollout >= settings["critic"]["warmup_rollouts"]
        metrics |= trainer.train_step(experience, pretraining, actor=learns)
        if (rollout + 1) % settings["log"] == 0 or rollout + 1 == batch["rollouts"]:
            context.report("update", update=rollout + 1, of=batch["rollouts"], **metrics)
        if settings["samples_every"] and (rollout + 1) % settings["samples_every"] == 0:
            report_samples(context, experience, rollout + 1)
        if before and due(settings["eval_every"], rollout, batch["rollouts"]):
            after = trainer.answer(held_out)
            context.report("eval", update=rollout + 1, of=batch["rollouts"], **summary(after, before))

    result: dict[str, float] = {}
    if before:
        after = trainer.answer(held_out)
        result = summary(after, before)
        report_answers(context, held_out, before, after)
    context.report("eval", update=batch["rollouts"], of=batch["rollouts"], **result)
    save_model(engines.actor, context.tokenizer, context.artifact("policy"), stop_ids=context.stop_ids)
    save_model(engines.critic, context.tokenizer, context.artifact("critic"), stop_ids=context.stop_ids)
    if trainer.average is not None:
        trainer.average.write()
        if before:
            averaged = {f"ema_{name}": value for name, value in summary(trainer.answer(held_out), before).items()}
            context.report("eval", update=batch["rollouts"], of=batch["rollouts"], **averaged)
            result |= averaged
        save_model(engines.actor, context.tokenizer, context.artifact("ema"), stop_ids=context.stop_ids)
    return result


def ptx_rows(context: Context, texts: Sequence[Example], rollout: int) -> list[list[Example]]:
    """This rank's pretraining rows for each update of a rollout."""
    updates, size = context.stage["batch"]["updates_per_rollout"], context.settings["ptx"]["batch"]
    batches = []
    for update in range(rollout * updates, (rollout + 1) * updates):
        chosen = batch_rows(len(texts), size, update, context.seed, context.shuffles("ptx"))
        batches.append([texts[i] for i in chosen[distributed.rank() :: distributed.world()]])
    return batches


def summary(answers: dict[str, Any], before: dict[str, Any] | None = None) -> dict[str, float]:
    """Held-out evaluation in numbers; beside `before`, also the gain in its deviations and the win rate over it."""
    scores = answers["scores"]
    numbers = {
        "eval_score": scores.mean().item(),
        "eval_score_std": scores.std(correction=0).item(),
        "eval_kl": answers["kl"].mean().item(),
        "eval_length": answers["lengths"].mean().item(),
        "eval_ended": answers["ended"].mean().item(),
        "eval_prompts": len(scores),
    }
    if before is not None:
        start = before["scores"]
        deviation = start.std(correction=0).clamp(min=1e-9)
        wins = (scores > start).double() + 0.5 * (scores == start).double()
        numbers["eval_gain"] = ((scores.mean() - start.mean()) / deviation).item()
        numbers["eval_win_rate"] = wins.mean().item()
        numbers["eval_score_before"] = start.mean().item()
    return numbers


def report_answers(context: Context, prompts: Sequence[Prompt], before: dict, after: dict) -> None:
    """Write each held-out prompt with its answer before and after to answers.jsonl (rank 0's share of them)."""
    if distributed.rank() != 0:
        return
    lines = []
    for row in sorted(before["ids"]):
        text = {name: context.tokenizer.decode(part["ids"][row], skip_special_tokens=True)
                for name, part in (("before", before), ("after", after))}  # fmt: skip
        lines.append({
            "prompt": context.tokenizer.decode(prompts[row].ids, skip_special_tokens=True), **text,
            "score_before": round(before["scores"][row].item(), 4),
            "score_after": round(after["scores"][row].item(), 4),
        })  # fmt: skip
    path = context.directory / "answers.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    for line in lines[:3]:
        context.report("sample", **line)


def report_samples(context: Context, experience: Experience, rollout: int) -> None:
    """Append the first answers of a rollout to samples.jsonl."""
    if distributed.rank() != 0:
        return
    with (context.directory / "samples.jsonl").open("a", encoding="utf-8") as file:
        for row in range(min(4, len(experience))):
            ids = experience.ids[row, : experience.lengths[row]]
            start = int(experience.prompt_lengths[row])
            line = {
                "rollout": rollout,
                "prompt": context.tokenizer.decode(ids[:start], skip_special_tokens=True),
                "answer": context.tokenizer.decode(ids[start:], skip_special_tokens=True),
                "score": round(experience.scores[row].item(), 4),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _per_token(engine: ScalarEngine, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Scalars of every position, [B, T], in micro batches."""
    whole = torch.zeros(ids.shape, device=ids.device)
    for start in range(0, len(ids), engine.micro):
        part, part_lengths = _trimmed(ids, lengths, start, engine.micro)
        whole[start : start + engine.micro, : part.shape[1]] = engine.scalars(part, part_lengths)
    return whole


def _trimmed(ids: torch.Tensor, lengths: torch.Tensor, start: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows start to start + size without the columns that only padding fills."""
    part = lengths[start : start + size]
    return ids[start : start + size, : int(part.max())], part
