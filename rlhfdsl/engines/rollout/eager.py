"""The eager rollout: the model's own `generate`. Slow and right everywhere; the reference for every other engine."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rlhfdsl.engines import passes
from rlhfdsl.engines.engine import PolicyEngine
from rlhfdsl.engines.rollout.interface import Prompts, Rollout, Sampler, Sampling
from rlhfdsl.engines.rollout.sampling import Distribution, draw, gumbel
from rlhfdsl.models.inputs import joined, length_mask


class EagerSampler(Sampler):
    """Samples with transformers' `generate` over the training weights, at any ZeRO stage."""

    name = "eager"

    def __init__(self, engine: PolicyEngine):
        self.engine = engine

    @torch.no_grad()
    def generate(self, request: Prompts, sampling: Sampling) -> Rollout:
        copies = sampling.n_samples_per_prompt
        prompts = request.prompt_ids.repeat_interleave(copies, 0)
        mask = request.prompt_attention_mask.repeat_interleave(copies, 0)
        start, size = prompts.shape[1], sampling.at_once or len(prompts)
        answers, log_probs = [], []
        for first in range(0, len(prompts), size):
            self.engine.pulse(f"{self.engine.name}: sampling")
            part = slice(first, first + size)
            empty = int((mask[part].sum(0) > 0).long().argmax())  # columns that are padding in every row of the part
            drawing = _Draw(request.seeds[part], sampling.distribution, start - empty)
            ids = self._decode(prompts[part, empty:], mask[part, empty:], drawing, sampling)
            answers.append(ids[:, start - empty :])
            log_probs.append(torch.stack(drawing.log_probs[: answers[-1].shape[1]], 1))
        whole = joined(answers, sampling.pad_id)
        lengths, ended = answer_lengths(whole, sampling.stop_ids)
        live = length_mask(lengths, whole.shape[1])
        return Rollout(
            input_ids=torch.cat([prompts, whole], 1),
            attention_mask=torch.cat([mask, live.to(mask.dtype)], 1),
            response_start_idx=torch.full_like(lengths, start),
            answer_lengths=lengths,
            ended=ended,
            log_probs=joined(log_probs, 0.0).masked_fill(~live, 0.0),
            seeds=request.seeds,
        )

    @torch.no_grad()
    def read(self, rollout: Rollout, distribution: Distribution) -> tuple[torch.Tensor, torch.Tensor]:
        """What decoding with `generate` says of a rollout's answers, [B, Ta] each and 0 beyond their ends.

        log p of every token, and how far it is, with its noise, behind the one that would be drawn there, or below what
        the distribution keeps: 0 where it is that one.
        """
        start = int(rollout.response_start_idx[0])
        answers = rollout.input_ids[:, start:]
        width = answers.shape[1]
        given = _Given(answers, rollout.seeds, distribution, start)
        self._decode(
            rollout.input_ids[:, :start], rollout.attention_mask[:, :start], given, Sampling(max_new_tokens=width)
        )
        beyond = ~length_mask(rollout.answer_lengths, width)
        log_probs, behind = (torch.stack(found, 1) for found in (given.log_probs, given.behind))
        return log_probs.masked_fill(beyond, 0.0), behind.masked_fill(beyond, 0.0)

    def _decode(
        self, prompts: torch.Tensor, mask: torch.Tensor, processor: LogitsProcessor, sampling: Sampling
    ) -> torch.Tensor:
        """`generate` with one logits processor and nothing else: ids [B, Tp + Ta]."""
        module = self.engine.module
        was_training, own = module.training, module.generation_config
        self.engine.eval()
        # `generate` fills what a call leaves open from the model's own generation_config, which may hold a penalty or a
        # top-k that makes the sampled distribution another one than the policy's: for the call it is set aside.
        module.generation_config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            eos_token_id=list(sampling.stop_ids) or None,
            pad_token_id=sampling.pad_id,
            use_cache=True,
        )
        try:
            with passes.with_masks(module):
                return module.generate(
                    prompts,
                    attention_mask=mask,
                    logits_processor=LogitsProcessorList([processor]),
                    synced_gpus=self.engine.partitioned,
                )
        finally:
            module.generation_config = own
            self.engine.deepspeed.train(was_training)


class _Draw(LogitsProcessor):
    """Turns `generate`'s argmax into a draw from a distribution; keeps the draws' log-probabilities."""

    def __init__(self, seeds: torch.Tensor, distribution: Distribution, start: int):
        self.seeds, self.distribution, self.start = seeds, distribution, start
        self.log_probs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen, log_probs = draw(scores, self.distribution, self.seeds, input_ids.shape[1] - self.start)
        self.log_probs.append(log_probs)
        return only(scores, chosen.unsqueeze(1))


class _Given(LogitsProcessor):
    """Turns `generate`'s argmax into given tokens [B, Ta]; keeps what `EagerSampler.read` says of them."""

    def __init__(self, answers: torch.Tensor, seeds: torch.Tensor, distribution: Distribution, start: int):
        self.answers, self.seeds, self.distribution, self.start = answers, seeds, distribution, start
        self.log_probs: list[torch.Tensor] = []
        self.behind: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        column = input_ids.shape[1] - self.start
        chosen = self.answers[:, column : column + 1]
        log_probs = (scores.float() / self.distribution.temperature).log_softmax(-1)
        own = log_probs.gather(1, chosen)
        self.log_probs.append(own.squeeze(1))
        lowest = self.distribution.lowest(log_probs)
        noise = gumbel(self.seeds, column, log_probs.shape[1])
        # A token at the edge of what is kept may be beyond it in the other engine, by rounding.
        best = (log_probs + noise).masked_fill(log_probs < torch.minimum(lowest, own), -torch.inf)
        behind = best.amax(1, keepdim=True) - (own + noise.gather(1, chosen)) + (lowest - own).clamp(min=0)
        self.behind.append(behind.squeeze(1))
        return only(scores, chosen)


def only(scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Scores [B, V] whose argmax is `chosen` [B, 1]."""
    return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def answer_lengths(answers: torch.Tensor, stop_ids: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths [B] up to and with the first stop id of `answers` [B, T], and whether there is one [B]."""
    stops = torch.isin(answers, torch.tensor(stop_ids, device=answers.device, dtype=answers.dtype))
    ended = stops.any(1)
    first = stops.int().argmax(1) + 1
    return torch.where(ended, first, answers.shape[1]), ended
