"""Held-out evaluation of a policy that learns from its own answers: one answer to each prompt, scored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from rlhfdsl.data.edge import Prompt
from rlhfdsl.engines import distributed
from rlhfdsl.training.context import Context, micro_batches
from rlhfdsl.training.losses import kl_estimate
from rlhfdsl.training.onpolicy import OnPolicy

EVALUATION = 1 << 40  # rollout number of the evaluation's noise, apart from every training rollout's


@torch.no_grad()
def answer(trainer: OnPolicy, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """One sampled answer to every prompt with the same noise at every call.

    Returns scores, kl, lengths [N] and ended [N] in prompt order on every rank, and this rank's texts by row.
    """
    dealt, own = distributed.my_rows(len(prompts))
    gathered: list[torch.Tensor] = []
    answers: dict[int, list[int]] = {}
    size = max(trainer.settings["rollout"]["batch"] // distributed.world(), 1)
    for rows in micro_batches(dealt, size):
        scored = trainer.score(trainer.sample([prompts[i] for i in rows], rows, EVALUATION, 1))
        kl = kl_estimate(scored.log_probs, scored.ref_log_probs, "k1") * scored.mask
        gathered.append(torch.stack([scored.scores, kl.sum(1), scored.mask.sum(1), scored.ended.float()], 1))
        for row, ids, start, end in zip(rows, scored.ids, scored.prompt_lengths, scored.lengths, strict=True):
            answers[row] = ids[start:end].tolist()
    whole = distributed.spread(torch.cat(gathered)[:own].double(), dealt[:own], len(prompts)).cpu()
    return {
        "scores": whole[:, 0], "kl": whole[:, 1], "lengths": whole[:, 2], "ended": whole[:, 3], "ids": answers,
    }  # fmt: skip


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
