"""The reward model: a scalar head read at the last real token, trained on pairs.

Ouyang et al. 2022, step 2, with both answers of a pair in one forward pass. Not here yet: rankings of more than two.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from rlhfdsl.data.collate import collate
from rlhfdsl.data.edge import Pair
from rlhfdsl.data.order import batch_rows
from rlhfdsl.engines import distributed
from rlhfdsl.engines.artifacts import save_model
from rlhfdsl.engines.engine import ScalarEngine
from rlhfdsl.training import effort
from rlhfdsl.training.context import Context, due
from rlhfdsl.training.losses import pair_loss
from rlhfdsl.training.micro import micro_pairs


def run(context: Context) -> dict[str, float]:
    """Train the model of a `reward` stage, evaluate it, and save it with its mean and deviation."""
    engine = context.engine("reward", ScalarEngine)
    train, held_out = context.rows("train"), context.rows("eval")
    updates, batch = context.stage["batch"]["updates"], context.stage["batch"]["batch"]
    settings = context.settings
    world, rank = distributed.world(), distributed.rank()
    keeper = context.keeper({"reward": engine}, updates)
    done = keeper.restore()

    for update in range(done, updates):
        started = time.perf_counter()
        chosen = batch_rows(len(train), batch, update, context.seed, context.shuffles("train"))
        mine = [train[i] for i in chosen[rank::world]]
        engine.train()
        sums = torch.zeros(3, device=engine.device)
        parts = micro_pairs([pair_lengths(pair) for pair in mine], engine, settings["length"])
        for rows in parts:
            better, worse = score_pairs(engine, [mine[i] for i in rows], context)
            losses = pair_loss(better, worse)
            engine.backward(losses.sum() / batch * world)
            margin = (better - worse).detach()
            sums += torch.stack([losses.detach().sum(), (margin > 0).sum(), margin.sum()])
        step = engine.step()
        if (update + 1) % settings["log"] == 0 or update + 1 == updates:
            seconds, lengths = time.perf_counter() - started, effort.tokens_of(read(mine))
            loss, accuracy, margin = (distributed.all_sum(sums) / batch).tolist()
            context.report(
                "update", update=update + 1, of=updates, batch=train.fingerprint(chosen), loss=loss, accuracy=accuracy,
                margin=margin, **step,
                **effort.speed(lengths, effort.learning(engine, lengths), seconds, engine.device),
            )  # fmt: skip
        if held_out and due(settings["eval_every"], update, updates):
            context.report("eval", update=update + 1, of=updates, **evaluate(engine, held_out, context))
        keeper.after(update + 1)

    result = evaluate(engine, held_out, context) if held_out else {}
    context.report("eval", update=updates, of=updates, **result)
    statistics = {
        "reward_mean": result.get("eval_reward_mean", 0.0) if settings["normalize"] else 0.0,
        "reward_std": result.get("eval_reward_std", 0.0),  # not measured
    }
    save_model(
        engine, context.tokenizer, context.artifact("reward"), stop_ids=context.stop_ids, extra=statistics
    )
    return result


def score_pairs(
    engine: ScalarEngine, pairs: Sequence[Pair], context: Context
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards [B] of the chosen and of the rejected answers, from one forward pass over 2B rows."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    batch = collate(rows, context.pad_id).to(engine.device)
    better, worse = engine.scores(batch.ids, batch.lengths, batch.total).chunk(2)
    return better, worse


def pair_lengths(pair: Pair) -> tuple[int, int]:
    """Tokens of a pair's two sequences."""
    return len(pair.chosen.ids), len(pair.rejected.ids)


def read(pairs: Sequence[Pair]) -> list[int]:
    """Tokens of each sequence that a forward pass reads, padding apart."""
    return [tokens for pair in pairs for tokens in pair_lengths(pair)]


@torch.no_grad()
def evaluate(engine: ScalarEngine, pairs: Sequence[Pair], context: Context) -> dict[str, float]:
    """Accuracy and mean margin on held-out pairs; mean and deviation of all their rewards."""
    engine.eval()
    dealt, own = distributed.my_rows(len(pairs))
    scores = torch.zeros(len(dealt), 2, device=engine.device, dtype=torch.float64)
    parts = micro_pairs([pair_lengths(pairs[i]) for i in dealt], engine, context.settings["length"])
    for part in parts:
        scores[part] = torch.stack(score_pairs(engine, [pairs[dealt[i]] for i in part], context), 1).double()
    whole = distributed.spread(scores[:own], dealt[:own], len(pairs))
    margin = whole[:, 0] - whole[:, 1]
    return {
        "eval_accuracy": (margin > 0).double().mean().item(),
        "eval_margin": margin.mean().item(),
        "eval_loss": pair_loss(whole[:, 0], whole[:, 1]).mean().item(),
        "eval_reward_mean": whole.mean().item(),
        "eval_reward_std": whole.std(correction=0).item(),
        "eval_accuracy_error": math.sqrt(0.25 / len(pairs)),
        "eval_pairs": len(pairs),
    }
