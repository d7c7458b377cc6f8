"""Direct preference optimisation: a policy from pairs of answers, without a reward model and without sampling.

Rafailov et al. 2023, equation 7: -log sigmoid(beta x (how much more likely the policy makes the chosen answer than the
reference does, less the same of the rejected one)). Label smoothing is that of Mitchell 2023 ("cDPO"). Both answers of
a pair are read in one forward pass. The reference is read on the fly, or of all pairs before the first update.

Left out: the losses of its relatives (IPO, KTO, ORPO, SimPO), length normalisation, an added likelihood term.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhfdsl.data.collate import collate
from rlhfdsl.data.edge import Pair
from rlhfdsl.data.order import batch_rows
from rlhfdsl.engines import distributed
from rlhfdsl.engines.artifacts import save_model
from rlhfdsl.engines.base import BasePolicy
from rlhfdsl.engines.engine import PolicyEngine
from rlhfdsl.training import effort, invariants
from rlhfdsl.training.context import Context, due
from rlhfdsl.training.losses import preference_loss
from rlhfdsl.training.micro import micro_pairs
from rlhfdsl.training.reading import Targets, target_statistics
from rlhfdsl.training.reward import pair_lengths, read


def run(context: Context) -> dict[str, float]:
    """Train the policy of a `dpo` stage, evaluate it and save it. Returns the final evaluation."""
    engine = context.engine("policy", PolicyEngine)
    train, held_out = context.rows("train"), context.rows("eval")
    updates, batch = context.stage["batch"]["updates"], context.stage["batch"]["batch"]
    settings = context.settings
    world, rank = distributed.world(), distributed.rank()
    reference = Reference(context, engine)
    reference.read("train", train)
    reference.read("eval", held_out)
    keeper = context.keeper({"policy": engine}, updates)
    done = keeper.restore()

    if held_out and not done:
        context.report("eval", update=0, of=updates, **evaluate(engine, reference, held_out, context))
    for update in range(done, updates):
        started = time.perf_counter()
        chosen = batch_rows(len(train), batch, update, context.seed, context.shuffles("train"))
        rows = chosen[rank::world]
        mine = [train[i] for i in rows]
        parts = micro_pairs([pair_lengths(pair) for pair in mine], engine, settings["length"])
        if update == 0 and reference.same:
            context.report("invariants", **check(engine, reference, train, [rows[i] for i in parts[0]], context))
        # All of the reference first: with LoRA it is the policy's own engine, switched to inference.
        theirs = [lead(reference("train", [rows[i] for i in part], [mine[i] for i in part])) for part in parts]
        engine.train()
        sums = torch.zeros(3, device=engine.device)
        for part, base in zip(parts, theirs, strict=True):
            margin = settings["beta"] * (lead(log_probs(engine, [mine[i] for i in part], context)) - base)
            losses = preference_loss(margin, settings["smoothing"])
            engine.backward(losses.sum() / batch * world)
            sums += torch.stack([losses.detach().sum(), (margin > 0).sum(), margin.detach().sum()])
        step = engine.step()
        if (update + 1) % settings["log"] == 0 or update + 1 == updates:
            seconds, lengths = time.perf_counter() - started, effort.tokens_of(read(mine))
            flops = effort.learning(engine, lengths) + reference.flops("train", lengths)
            loss, accuracy, mean_margin = (distributed.all_sum(sums) / batch).tolist()
            context.report(
                "update", update=update + 1, of=updates, batch=train.fingerprint(chosen), loss=loss, accuracy=accuracy,
                margin=mean_margin, **step, **effort.speed(lengths, flops, seconds, engine.device),
            )  # fmt: skip
        if held_out and due(settings["eval_every"], update, updates):
            context.report("eval", update=update + 1, of=updates, **evaluate(engine, reference, held_out, context))
        keeper.after(update + 1)

    result = evaluate(engine, reference, held_out, context) if held_out else {}
    context.report("eval", update=updates, of=updates, **result)
    save_model(engine, context.tokenizer, context.artifact("policy"), stop_ids=context.stop_ids)
    return result


class Reference:
    """Log-probabilities [B, 2] of chosen and rejected answers under the frozen policy.

    With `precompute` all pairs are read once and kept in a file of the stage, so that a stage that starts again in its
    middle finds them; the reference is then the policy itself before its first update, or an engine that is let go.
    """

    def __init__(self, context: Context, policy: PolicyEngine):
        self.context = context
        own = "ref" in context.stage["engines"]
        self.same = not own or context.weights_of("policy") == context.weights_of("ref")
        self.engine: PolicyEngine | BasePolicy | None = context.reference(policy) if own else policy
        self.tables: dict[str, Tensor] = {}

    def read(self, edge: str, pairs: Sequence[Pair]) -> None:
        """Read all pairs of an edge, where the stage precomputes. `eval` is the last edge."""
        if not self.context.settings["precompute"]:
            return
        path = self.context.directory / f"reference-{edge}.pt"
        if path.exists():
            self.tables[edge] = torch.load(path, weights_only=True)
        elif pairs:
            self.tables[edge] = self._table(pairs)
            if distributed.rank() == 0:
                torch.save(self.tables[edge], path.with_suffix(".partial"))
                path.with_suffix(".partial").replace(path)
        distributed.barrier()
        if edge == "eval":
            self.engine = None
            gc.collect()

    @torch.no_grad()
    def __call__(self, edge: str, rows: Sequence[int], pairs: Sequence[Pair]) -> Tensor:
        """[B, 2] of `pairs`, which are `rows` of the edge."""
        if edge in self.tables:
            return self.tables[edge][list(rows)].to(self.context.device)
        assert self.engine is not None
        self.engine.eval()
        return log_probs(self.engine, pairs, self.context)

    def flops(self, edge: str, lengths: Tensor) -> Tensor:
        """What a call for sequences of `lengths` computes: nothing where all pairs were read before."""
        if edge in self.tables:
            return torch.zeros((), dtype=torch.float64)
        assert self.engine is not None
        return effort.reading(self.engine, lengths)

    @torch.no_grad()
    def _table(self, pairs: Sequence[Pair]) -> Tensor:
        engine, length = self.engine, self.context.settings["length"]
        assert engine is not None
        engine.eval()
        dealt, own = distributed.my_rows(len(pairs))
        found = torch.zeros(len(dealt), 2, device=engine.device)
        for part in micro_pairs([pair_lengths(pairs[i]) for i in dealt], engine, length):
            found[part] = log_probs(engine, [pairs[dealt[i]] for i in part], self.context)
        return distributed.spread(found[:own], dealt[:own], len(pairs)).cpu()


def log_probs(engine: PolicyEngine | BasePolicy, pairs: Sequence[Pair], context: Context) -> Tensor:
    """Summed log-probability of the answers' tokens, [B, 2] for chosen and rejected."""
    batch = collate([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs], context.pad_id)
    batch = batch.to(engine.device)
    per_token, _ = target_statistics(engine, batch.ids, batch.lengths, Targets.of(batch.loss), total=batch.total)
    return per_token.sum(1).view(2, -1).T


def lead(pair_log_probs: Tensor) -> Tensor:
    """How much likelier the chosen answer is than the rejected one, in nats: [B, 2] -> [B]."""
    return pair_log_probs[:, 0] - pair_log_probs[:, 1]


@torch.no_grad()
def check(
    engine: PolicyEngine, reference: Reference, train: Sequence[Pair], rows: list[int], context: Context
) -> dict[str, float]:
    """Before the first update policy and reference of the same weights agree, in nats a token. Raises UserError."""
    pairs = [train[i] for i in rows]
    tokens = torch.tensor([[sum(pair.chosen.loss), sum(pair.rejected.loss)] for pair in pairs], device=engine.device)
    theirs = reference("train", rows, pairs) / tokens
    engine.train()
    ours = log_probs(engine, pairs, context) / tokens
    drift = invariants.reference_agrees(ours, theirs, torch.ones_like(tokens, dtype=torch.bool), engine.spec["dtype"])
    return {"invariant_reference": drift}


@torch.no_grad()
def evaluate(
    engine: PolicyEngine, reference: Reference, pairs: Sequence[Pair], context: Context
) -> dict[str, float]:
    """Held-out pairs by the implicit reward, beta x (log p - log p of the reference): how often it prefers the chosen
    answer, by how much, and what became of both answers' rewards."""
    engine.eval()
    settings = context.settings
    dealt, own = distributed.my_rows(len(pairs))
    found = torch.zeros(len(dealt), 2, device=engine.device, dtype=torch.float64)
    parts = micro_pairs([pair_lengths(pairs[i]) for i in dealt], engine, settings["length"])
    for part in parts:
        rows = [dealt[i] for i in part]
        some = [pairs[i] for i in rows]
        found[part] = (log_probs(engine, some, context) - reference("eval", rows, some)).double()
    rewards = settings["beta"] * distributed.spread(found[:own], dealt[:own], len(pairs))
    margin = lead(rewards)
    # Before the first update every margin is 0, which prefers neither: a tie counts half.
    right = (margin > 0).double() + 0.5 * (margin == 0).double()
    return {
        "eval_accuracy": right.mean().item(),
        "eval_margin": margin.mean().item(),
        "eval_loss": preference_loss(margin, settings["smoothing"]).mean().item(),
        "eval_chosen_reward": rewards[:, 0].mean().item(),
        "eval_rejected_reward": rewards[:, 1].mean().item(),
        "eval_accuracy_error": math.sqrt(0.25 / len(pairs)),
        "eval_pairs": len(pairs),
    }
