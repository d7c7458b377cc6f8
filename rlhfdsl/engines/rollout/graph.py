"""The graph rollout: one decode step over a static KV cache, captured in a CUDA graph and replayed.

Same interface and same results as the eager rollout: the noise is a function of the row and the step. Answers are
sampled in slots. A slot gets a prompt (all but its last token read at once, a prompt's keys going to all its answers
that start together) and then reads one token a step, from the prompt's last one on; when its answer ends, the slot
gets the next prompt. Attention reads the columns that a slot has, and none of an idle one. On CUDA the step is
captured once for each number of slots; the graph reads the training parameters where they lie, so it sees every
update. On the CPU the same step runs without a graph.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from rlhfdsl.engines.engine import PolicyEngine
from rlhfdsl.engines.rollout.attention import over_rows
from rlhfdsl.engines.rollout.cache import RowCache
from rlhfdsl.engines.rollout.eager import answer_lengths
from rlhfdsl.engines.rollout.families import gets_no_mask, own_attention
from rlhfdsl.engines.rollout.fusing import fused
from rlhfdsl.engines.rollout.group import TensorGroup
from rlhfdsl.engines.rollout.interface import Prompts, Rollout, Sampler, Sampling, right_padded
from rlhfdsl.engines.rollout.sampling import draw
from rlhfdsl.engines.rollout.slots import Law, Slots
from rlhfdsl.engines.rollout.weights import CopiedWeights
from rlhfdsl.language.diagnostics import first_line
from rlhfdsl.models.inputs import length_mask, takes

CHECK_EVERY = 8  # steps between two looks at which slots are idle; on CUDA a look waits for the device
REFILL = 8  # idle slots wait until they are an eighth of all, since a prefill costs a few decode steps however small
PREFILL_TOKENS = 32_768  # prompt tokens of one prefill forward, padding included
COLUMNS = 64  # the cache's columns are a multiple of this, so that near lengths share one

logger = logging.getLogger(__name__)


class GraphSampler(Sampler):
    """Samples through a row cache from the training weights: in place at ZeRO 0 to 2, from a whole copy at ZeRO 3.

    tensor: ranks that share a copy, each with its part, and sample their answers together.
    captured: the graph of a step by its number of slots (CUDA only). compiled: whether torch compiles parts of it.
    """

    name = "graph"

    def __init__(self, engine: PolicyEngine, tensor: int = 1):
        self.engine = engine
        self.group = TensorGroup(tensor) if tensor > 1 else None
        self.compiled = True
        self.captured: dict[int, torch.cuda.CUDAGraph] = {}
        self.capture_failure: str | None = None
        self.copied = CopiedWeights(engine, self.group) if engine.partitioned or self.group is not None else None
        self.cache: RowCache | None = None
        self.slots: Slots | None = None
        self._law: Law | None = None
        self._stops: torch.Tensor | None = None
        self._addresses: tuple[int, ...] = ()

    @property
    def model(self) -> nn.Module:
        return self.engine.module if self.copied is None else self.copied.model

    @torch.no_grad()
    def generate(self, request: Prompts, sampling: Sampling) -> Rollout:
        was_training = self.engine.module.training
        self.engine.eval()
        try:
            if self.copied is not None:
                self.copied.refresh()
            with over_rows(self.model), own_attention(self.model):
                return self._generate(request, sampling)
        finally:
            self.engine.deepspeed.train(was_training)

    def release(self) -> None:
        """Drop graphs, cache and copied weights; the next `generate` makes them again."""
        self.captured.clear()
        self.cache = self.slots = None
        if self.copied is not None:
            self.copied.release()
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()

    def _generate(self, request: Prompts, sampling: Sampling) -> Rollout:
        if self.group is None:
            answers, log_probs = self._decode(request, sampling, sampling.at_once)
        else:
            together, own = self.group.gathered(request, sampling.n_samples_per_prompt)
            at_once = None if sampling.at_once is None else sampling.at_once * self.group.size
            answers, log_probs = (whole[own] for whole in self._decode(together, sampling, at_once))
        return _assembled(request, sampling.n_samples_per_prompt, answers, log_probs, sampling.stop_ids)

    def _decode(
        self, request: Prompts, sampling: Sampling, at_once: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Answers [B, max_new_tokens] and their log-probabilities; what is beyond an end is not meant."""
        copies, longest = sampling.n_samples_per_prompt, sampling.max_new_tokens
        prompt_lengths = request.prompt_attention_mask.sum(1)
        prompts, width = right_padded(request.prompt_ids, prompt_lengths), request.prompt_ids.shape[1]
        count = len(prompts) * copies
        law = Law(sampling.distribution, longest, sampling.stop_ids, sampling.pad_id)
        slots = self._reserve(min(count, at_once or count), width + longest, law)
        answers = torch.full((count, longest), sampling.pad_id, device=self.engine.device)
        log_probs = torch.zeros(count, longest, device=self.engine.device)

        # the longest prompts first: those of one prefill are then of about one length
        lengths = prompt_lengths.tolist()
        by_length = sorted(range(len(prompts)), key=lambda prompt: -lengths[prompt])
        waiting = [prompt * copies + copy for prompt in by_length for copy in range(copies)]
        held: dict[int, int] = {}  # row of the answer by slot
        size = len(slots.token)
        while waiting or held:
            free = [slot for slot in range(size) if slot not in held]
            if waiting and (not held or len(free) * REFILL >= size):
                rows, waiting = waiting[: len(free)], waiting[len(free) :]
                started = dict(zip(free, rows, strict=False))
                self._admit(slots, started, prompts, lengths, request.seeds, copies)
                held |= started
            for _ in range(CHECK_EVERY):
                self._advance(size)
            idle = slots.idle.tolist()
            done = {slot: row for slot, row in held.items() if idle[slot]}
            if done:
                at, rows_done = self._indices(done.keys()), self._indices(done.values())
                answers[rows_done] = slots.answers[at, :longest]
                log_probs[rows_done] = slots.log_probs[at, :longest]
                held = {slot: row for slot, row in held.items() if slot not in done}
        return answers, log_probs

    def _admit(
        self,
        slots: Slots,
        started: dict[int, int],
        prompts: torch.Tensor,
        lengths: Sequence[int],
        seeds: torch.Tensor,
        copies: int,
    ) -> None:
        """Give slots their rows: right-padded `prompts` [P, T] with `lengths`; row r answers prompt r // copies.

        A real token never sees the padding to its right, and the padding's own keys are outside every length until a
        token overwrites them.
        """
        chosen = list(dict.fromkeys(row // copies for row in started.values()))
        by_prompt: dict[int, list[int]] = {prompt: [] for prompt in chosen}
        for slot, row in started.items():
            by_prompt[row // copies].append(slot)
        while chosen:
            width = max(max(lengths[p] for p in chosen) - 1, 1)
            part, chosen = chosen[: max(PREFILL_TOKENS // width, 1)], chosen[max(PREFILL_TOKENS // width, 1) :]
            width = max(lengths[p] for p in part) - 1
            if width == 0:
                continue
            source = [i for i, prompt in enumerate(part) for _ in by_prompt[prompt]]
            self.cache.fill(self._indices(s for p in part for s in by_prompt[p]), self._indices(source))
            ids = prompts[self._indices(part), :width]
            self._forward(ids, torch.arange(width, device=ids.device).expand(ids.shape))
        at, rows = self._indices(started.keys()), self._indices(started.values())
        last = self._indices(lengths[row // copies] - 1 for row in started.values())
        slots.token[at] = prompts[rows // copies, last]
        slots.write[at] = last
        slots.length[at] = (last + 1).view(-1, 1, 1, 1)
        slots.step[at] = 0
        slots.seed[at] = seeds[rows]
        slots.idle[at] = False
        slots.answers[at] = self._law.pad_id
        slots.log_probs[at] = 0.0

    def _advance(self, count: int) -> None:
        graph = self.captured.get(count)
        if graph is not None:
            graph.replay()
        else:
            self._step(self.slots.first(count))

    def _step(self, slots: Slots) -> None:
        """Read one token of every slot and draw the next; an idle slot goes through the motions and changes nothing."""
        law = self._law
        self.cache.decode(slots.write, slots.length)
        logits = self._forward(slots.token.unsqueeze(1), slots.write.unsqueeze(1))[:, -1]
        if logits.is_cuda and not law.distribution.cuts:
            from rlhfdsl.engines.rollout.kernels import drawing

            temperature = law.distribution.temperature
            if self.group is None:
                drawing.advance(logits, temperature, slots, self._stops, law.longest)
                return
            chosen, log_probs = drawing.draw(logits, temperature, slots.seed, slots.step)
        else:
            chosen, log_probs = draw(logits, law.distribution, slots.seed, slots.step)
        if self.group is not None:
            chosen, log_probs = self.group.agreed(chosen, log_probs)
        slots.advance(chosen, log_probs, self._stops, law.longest)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [B, 1, V] of the last column, of prompts or of a token of each row as the cache has been told."""
        mask = None if gets_no_mask(self.model) else self.cache.lengths
        arguments = {"position_ids": positions} if takes(type(self.model), "position_ids") else {}
        return self.model(
            input_ids=ids, attention_mask=mask, past_key_values=self.cache, use_cache=True, logits_to_keep=1,
            **arguments,
        ).logits  # fmt: skip

    def _indices(self, numbers) -> torch.Tensor:
        return torch.tensor(list(numbers), device=self.engine.device, dtype=torch.int64)

    # -- memory and graphs ---------------------------------------------------------------------------------------

    def _reserve(self, count: int, columns: int, law: Law) -> Slots:
        """At least `count` slots of at least so many columns, all idle.

        They only grow, since a captured graph knows their addresses; a few rows use a graph of at most twice as many.
        """
        columns = -(-columns // COLUMNS) * COLUMNS
        addresses = tuple(parameter.data_ptr() for parameter in self.model.parameters())
        if law != self._law or addresses != self._addresses:
            self.captured.clear()
            self._law, self._addresses = law, addresses
            # -1 is no token: a stage without stop ids samples to the end
            self._stops = torch.tensor(law.stop_ids or (-1,), device=self.engine.device)
        count = min((n for n in self.captured if count <= n <= 2 * count), default=count)
        if self.cache is None or not (
            count <= self.cache.rows and columns <= self.cache.columns and law.longest <= self.slots.answers.shape[1]
        ):
            rows, answer = count, law.longest
            if self.cache is not None:
                rows, columns = max(rows, self.cache.rows), max(columns, self.cache.columns)
                answer = max(answer, self.slots.answers.shape[1])
            self.captured.clear()
            self.cache = self.slots = None
            layers = self.model.config.get_text_config().num_hidden_layers
            self.cache = RowCache(layers, rows, columns)
            self.slots = Slots.empty(rows, answer, self.engine.device)
        slots = self.slots.first(count)
        if self.engine.device.type == "cuda":
            self._capture(slots)
        slots.rest()
        return slots

    def _capture(self, slots: Slots) -> None:
        """Capture the decode step of these slots.

        A model that cannot be captured decodes without a graph: slower, and as right.
        """
        if len(slots.token) in self.captured or self.capture_failure:
            return
        slots.rest()
        if self.compiled:
            try:
                with fused(self.model, compiled=True):
                    self._record(slots)
                return
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler says
                self.compiled = False
                logger.warning("torch.compile fails here, the decode step does without: %s", first_line(error))
        with fused(self.model, compiled=False):
            self._record(slots)

    def _record(self, slots: Slots) -> None:
        self._step(slots)  # on the stream of the rollout: allocates the cache and compiles the kernels
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(slots)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: NCCL's watchdog thread may look at the device meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._step(slots)
        except RuntimeError as error:
            torch.cuda.synchronize()
            self.capture_failure = first_line(error)
            logger.warning("the decode step cannot be captured and runs without a graph: %s", self.capture_failure)
            return
        self.captured[len(slots.token)] = graph


def _assembled(
    request: Prompts, copies: int, answers: torch.Tensor, log_probs: torch.Tensor, stop_ids: tuple[int, ...]
) -> Rollout:
    answer_length, ended = answer_lengths(answers, stop_ids)
    columns = int(answer_length.max())
    live = length_mask(answer_length, columns)
    mask = request.prompt_attention_mask.repeat_interleave(copies, 0)
    return Rollout(
        input_ids=torch.cat([request.prompt_ids.repeat_interleave(copies, 0), answers[:, :columns]], 1),
        attention_mask=torch.cat([mask, live.to(mask.dtype)], 1),
        response_start_idx=torch.full_like(answer_length, request.prompt_ids.shape[1]),
        answer_lengths=answer_length,
        ended=ended,
        log_probs=log_probs[:, :columns].masked_fill(~live, 0.0),
        seeds=request.seeds,
    )
