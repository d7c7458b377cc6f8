"""Supervised fine-tuning: next-token loss on the answers, averaged over the tokens of the whole global batch.

Ouyang et al. 2022, step 1. Rows that are packed into one pass (models/packing.py) do not see each other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from rlhfdsl.data.collate import Batch, collate
from rlhfdsl.data.edge import Example
from rlhfdsl.data.order import batch_rows
from rlhfdsl.engines import distributed
from rlhfdsl.engines.artifacts import save_model
from rlhfdsl.engines.engine import PolicyEngine
from rlhfdsl.training import effort
from rlhfdsl.training.context import Context, due
from rlhfdsl.training.losses import token_mean
from rlhfdsl.training.micro import micro_parts
from rlhfdsl.training.reading import Targets, target_statistics


def run(context: Context) -> dict[str, float]:
    """Train the policy of an `sft` stage, evaluate it and save it. Returns the final evaluation."""
    engine = context.engine("policy", PolicyEngine)
    train, held_out = context.rows("train"), context.rows("eval")
    updates, batch = context.stage["batch"]["updates"], context.stage["batch"]["batch"]
    settings = context.settings
    world, rank = distributed.world(), distributed.rank()
    keeper = context.keeper({"policy": engine}, updates)
    done = keeper.restore()

    if held_out and not done:
        context.report("eval", update=0, of=updates, **evaluate(engine, held_out, context))
    for update in range(done, updates):
        started = time.perf_counter()
        chosen = batch_rows(len(train), batch, update, context.seed, context.shuffles("train"))
        mine = [train[i] for i in chosen[rank::world]]
        tokens = supervised_tokens(mine, engine.device)
        engine.train()
        loss = torch.zeros((), device=engine.device)
        (parts,) = micro_parts([len(row.ids) for row in mine], engine, settings["length"])
        for rows in parts:
            part = token_loss(engine, collate([mine[i] for i in rows], context.pad_id).to(engine.device), tokens)
            engine.backward(part)
            loss += part.detach()
        step = engine.step()
        if (update + 1) % settings["log"] == 0 or update + 1 == updates:
            seconds, lengths = time.perf_counter() - started, effort.tokens_of(len(row.ids) for row in mine)
            mean_loss = distributed.all_sum(loss).item() / world
            context.report(
                "update", update=update + 1, of=updates, batch=train.fingerprint(chosen), loss=mean_loss, **step,
                tokens=int(tokens), **effort.speed(lengths, effort.learning(engine, lengths), seconds, engine.device),
            )  # fmt: skip
        if held_out and due(settings["eval_every"], update, updates):
            context.report("eval", update=update + 1, of=updates, **evaluate(engine, held_out, context))
        keeper.after(update + 1)

    result = evaluate(engine, held_out, context) if held_out else {}
    context.report("eval", update=updates, of=updates, **result)
    save_model(engine, context.tokenizer, context.artifact("policy"), stop_ids=context.stop_ids)
    return result


def token_loss(engine: PolicyEngine, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
    """This micro batch's part of the global token-mean loss, ready for `backward`."""
    log_probs, _ = target_statistics(engine, batch.ids, batch.lengths, Targets.of(batch.loss), total=batch.total)
    return token_mean(-log_probs, batch.loss, tokens, distributed.world())


def supervised_tokens(rows: Sequence[Example], device: torch.device) -> torch.Tensor:
    """How many tokens of the global batch carry a loss. The first token of a row has no prediction."""
    return distributed.all_sum(torch.tensor(float(sum(sum(row.loss[1:]) for row in rows)), device=device))


@torch.no_grad()
def evaluate(engine: PolicyEngine, rows: Sequence[Example], context: Context) -> dict[str, float]:
    """Mean loss of the supervised tokens of `rows`, and its perplexity."""
    engine.eval()
    dealt, own = distributed.my_rows(len(rows))
    total = torch.zeros(2, device=engine.device, dtype=torch.float64)
    (parts,) = micro_parts([len(rows[i].ids) for i in dealt], engine, context.settings["length"])
    for part in parts:
        batch = collate([rows[dealt[i]] for i in part], context.pad_id).to(engine.device)
        log_probs, _ = target_statistics(engine, batch.ids, batch.lengths, Targets.of(batch.loss), total=batch.total)
        counted = batch.loss & (part < own).to(engine.device).unsqueeze(1)
        total += torch.stack([(-log_probs * counted).sum(), counted.sum()]).double()
    loss, tokens = distributed.all_sum(total).tolist()
    mean = loss / max(tokens, 1.0)
    return {"eval_loss": mean, "eval_perplexity": math.exp(min(mean, 700.0)), "eval_rows": len(rows)}
