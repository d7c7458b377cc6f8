"""The course of a stage that learns from its own answers: rollouts, reports, evaluation, and what it saves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

from rlhfdsl.data.edge import Example
from rlhfdsl.data.order import batch_rows
from rlhfdsl.engines import distributed
from rlhfdsl.engines.artifacts import save_model
from rlhfdsl.engines.engine import ScalarEngine
from rlhfdsl.engines.hybrid import HybridEngine
from rlhfdsl.training.context import Context, due
from rlhfdsl.training.evaluation import answer, report_answers, summary
from rlhfdsl.training.experience import Experience
from rlhfdsl.training.gate import pass_gate
from rlhfdsl.training.onpolicy import Engines, OnPolicy
from rlhfdsl.training.rewards import ModelReward, Reward, TextReward, Weighted, endpoint, function_of, saved_with


def make_engines(context: Context) -> Engines:
    """The engines of a stage, as its plan lays them out."""
    settings = context.settings
    longest = settings["rollout"]["prompt"] + settings["rollout"]["answer"]
    actor = context.engine("actor", HybridEngine)
    critic = make_critic(context) if "critic" in context.stage["engines"] else None
    ref = context.reference(actor)

    def decode(ids: list[int]) -> str:
        return context.tokenizer.decode(ids, skip_special_tokens=True)

    def reward_of(source: dict[str, Any]) -> Reward:
        at = f"scorer.{source['name']}"
        match source["kind"]:
            case "model":
                judge = context.engine(source["engine"], ScalarEngine)
                return ModelReward(judge, longest=longest, normalize=settings["reward"]["normalize"])
            case "endpoint":
                return TextReward(f"POST {source['url']}", endpoint(source["url"], source["timeout"]), decode, at)
        pins = source["facts"]["files"][source["file"]] if source["facts"] is not None else None
        function = function_of(context.base / source["file"], source["function"], pins)
        return TextReward(f"`{source['function']}` of `{source['file']}`", function, decode, at)

    sources = settings["reward"]["sources"]
    terms = [(source["name"], source["weight"], reward_of(source)) for source in sources]
    reward = terms[0][2] if len(terms) == 1 else Weighted(terms)
    return Engines(actor, ref, reward, critic)


def make_critic(context: Context) -> ScalarEngine:
    """PPO's critic.

    One that begins as a reward model begins on the scale of the rewards: less the mean that the model was saved with,
    and over its deviation where rewards are divided by theirs. What is saved has both beside its weights.
    """
    critic = context.engine("critic", ScalarEngine)
    critic.mean, deviation = saved_with(critic)
    if context.settings["reward"]["normalize"] and deviation > 0:
        critic.deviation = deviation
    return critic


def run(context: Context, algorithm: type[OnPolicy]) -> dict[str, float]:
    """Train a stage with `algorithm`, evaluate against the policy it started from, and save what it made."""
    settings, batch = context.settings, context.stage["batch"]
    engines = make_engines(context)
    trainer = algorithm(
        engines, settings, at_once=batch["generate_per_rank"],
        stop_ids=context.stop_ids, pad_id=context.pad_id, seed=context.seed,
    )  # fmt: skip
    prompts, held_out, texts = context.rows("train"), context.rows("eval"), context.rows("ptx")
    world, rank = distributed.world(), distributed.rank()
    warmup = settings["critic"]["warmup_rollouts"] if engines.critic is not None else 0

    trained = {engine.name: engine for engine in trainer.trained(actor=True)}
    keeper = context.keeper(trained, batch["rollouts"], trainer)
    done = keeper.restore()
    context.report("rollout", **pass_gate(trainer, prompts[rank::world] or prompts))
    if held_out and not done:
        trainer.before = answer(trainer, held_out)
        context.report("eval", update=0, of=batch["rollouts"], **summary(trainer.before))
    before = trainer.before
    for rollout in range(done, batch["rollouts"]):
        chosen = batch_rows(len(prompts), batch["prompts"], rollout, context.seed, context.shuffles("train"))
        rows = list(range(rank, batch["prompts"], world))
        experience, metrics = trainer.generate_experience([prompts[chosen[i]] for i in rows], rows)
        if rollout == 0:
            same = context.weights_of("actor") == context.weights_of("ref")
            context.report("invariants", **trainer.check(experience, same))
        pretraining = ptx_rows(context, texts, rollout) if texts else ()
        metrics |= trainer.train_step(experience, pretraining, actor=rollout >= warmup)
        if (rollout + 1) % settings["log"] == 0 or rollout + 1 == batch["rollouts"]:
            read = {"batch": prompts.fingerprint(chosen)}
            if texts:
                read["ptx_batch"] = texts.fingerprint([*chain.from_iterable(ptx_numbers(context, texts, rollout))])
            context.report("update", update=rollout + 1, of=batch["rollouts"], **read, **metrics)
        if settings["samples_every"] and (rollout + 1) % settings["samples_every"] == 0:
            report_samples(context, experience, rollout + 1)
        if before and due(settings["eval_every"], rollout, batch["rollouts"]):
            after = answer(trainer, held_out)
            context.report("eval", update=rollout + 1, of=batch["rollouts"], **summary(after, before))
        keeper.after(rollout + 1)

    result: dict[str, float] = {}
    if before:
        after = answer(trainer, held_out)
        result = summary(after, before)
        report_answers(context, held_out, before, after)
    context.report("eval", update=batch["rollouts"], of=batch["rollouts"], **result)
    save_model(engines.actor, context.tokenizer, context.artifact("policy"), stop_ids=context.stop_ids)
    if engines.critic is not None:
        save_model(engines.critic, context.tokenizer, context.artifact("critic"), stop_ids=context.stop_ids)
    if trainer.average is not None:
        trainer.average.write()
        if before:
            averaged = {f"ema_{name}": value for name, value in summary(answer(trainer, held_out), before).items()}
            context.report("eval", update=batch["rollouts"], of=batch["rollouts"], **averaged)
            result |= averaged
        save_model(engines.actor, context.tokenizer, context.artifact("ema"), stop_ids=context.stop_ids)
    return result


def ptx_numbers(context: Context, texts: Sequence[Example], rollout: int) -> list[list[int]]:
    """The numbers of all ranks' pretraining rows for each update of a rollout."""
    updates, size = context.stage["batch"]["updates_per_rollout"], context.settings["ptx"]["batch"]
    return [
        batch_rows(len(texts), size, update, context.seed, context.shuffles("ptx"))
        for update in range(rollout * updates, (rollout + 1) * updates)
    ]


def ptx_rows(context: Context, texts: Sequence[Example], rollout: int) -> list[list[Example]]:
    """This rank's pretraining rows for each update of a rollout."""
    rank, world = distributed.rank(), distributed.world()
    return [[texts[i] for i in chosen[rank::world]] for chosen in ptx_numbers(context, texts, rollout)]


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
