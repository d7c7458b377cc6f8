"""One model of a stage on a DeepSpeed engine: forward, accumulate, step, save."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import deepspeed
import torch
from torch import nn

from rlhfdsl.engines import gathering, gradients, norms, passes
from rlhfdsl.engines.resting import Resting
from rlhfdsl.engines.schedule import learning_rate
from rlhfdsl.language.diagnostics import UserError, first_line
from rlhfdsl.models.inputs import forward_inputs, length_mask, packed_inputs, takes
from rlhfdsl.models.loading import parameter_count
from rlhfdsl.models.packing import Packing
from rlhfdsl.models.scalar import at_last
from rlhfdsl.planning.cut import PassCost
from rlhfdsl.planning.flops import UNKNOWN, Forward

# Relative distance between a packed pass and a padded one: rounding, and far below what another row's tokens would do.
PACKED_TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05}

logger = logging.getLogger(__name__)


class Engine(ABC):
    """A DeepSpeed engine with the bookkeeping of updates.

    A minibatch is any number of `backward` calls and then one `step`. Each backward takes
    `sum of its losses / tokens of the whole minibatch over all ranks x world`; DeepSpeed averages over the ranks, so
    the step sees the exact gradient of the global mean, however the minibatch was cut into micro batches.
    """

    def __init__(self, name: str, spec: dict, module: nn.Module):
        self.name = name
        self.spec = spec
        self.micro: int = spec["micro"]
        self.updates = 0
        self.pulse: Callable[[str], None] = lambda doing: None  # told what this engine begins to do
        self.flops: Forward = UNKNOWN  # of its forward pass, by the plan
        self.finite: torch.Tensor | None = None  # whether every loss since the last step was
        parameters = _groups(module, spec) if spec["trains"] else None
        self.deepspeed, *_ = deepspeed.initialize(
            model=module, model_parameters=parameters, config=copy.deepcopy(spec["deepspeed"])
        )
        self.device = self.deepspeed.device
        if self.partitioned:
            gathering.by_layer(self.module, self.deepspeed.optimizer)
        self.rows = passes.without_masks(self.module)
        if self.device.type == "cuda":
            norms.in_one_kernel(self.module)
        gradients.in_few_passes(self.deepspeed.optimizer)
        if spec["trains"] and spec["zero"] == 0:
            self.deepspeed.clip_fp32_gradients = self._clip
        if not spec["trains"]:
            self.deepspeed.eval()
        layers = self.module.config.get_text_config().num_hidden_layers
        count = parameter_count(self.module)
        self.resting = Resting(self.module) if spec["offload"] == "idle" else None
        packs = self.rows is not None and spec["packing"] and self._packs_right()
        tensors = sum(1 for _ in self.module.parameters()) if self.partitioned else 0
        self.cost = PassCost.of(self.device.type, layers, count, packs, tensors)
        self.rest()

    def rest(self) -> None:
        """Leave the device until the next forward, where the plan says so of an engine that is not in use."""
        if self.resting is not None:
            self.resting.rest()

    def wake(self) -> None:
        """Be on the device."""
        if self.resting is not None:
            self.resting.wake()

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    @property
    def partitioned(self) -> bool:
        """Whether the parameters lie in shards on the ranks (ZeRO 3)."""
        return self.spec["deepspeed"]["zero_optimization"]["stage"] == 3

    def train(self) -> None:
        self.deepspeed.train()

    def eval(self) -> None:
        self.deepspeed.eval()

    @abstractmethod
    def read(self, ids: torch.Tensor, lengths: torch.Tensor, total: int | None) -> torch.Tensor:
        """What the model says at each of the real tokens of right-padded `ids` [B, T], [N, …]; total: their number N,
        where they may be read without the padding."""

    def packing(self, lengths: torch.Tensor, width: int, total: int | None) -> Packing | None:
        """How a pass reads rows of `lengths` [B] that are padded to `width`: as they are (None), or packed.

        total: tokens of the rows, where the caller knows it.
        """
        if total is None or not self.cost.packed(total, len(lengths) * width):
            return None
        return Packing.of(lengths, width, total)

    @contextlib.contextmanager
    def _packed(self, packing: Packing | None) -> Iterator[None]:
        """A forward pass over packed rows; the backward pass, which may compute layers anew, is over them too."""
        if self.rows is not None:
            self.rows.packing = packing
        yield
        if not torch.is_grad_enabled():
            self._unpack()

    def _unpack(self) -> None:
        if self.rows is not None:
            self.rows.packing = None

    @torch.no_grad()
    def _packs_right(self) -> bool:
        """Whether a pass over real tokens alone says what one over padded rows does, of these weights.

        Where a row's tokens reached another's through anything but attention, a convolution or a state, it would not.
        """
        self.cost = PassCost(0.0, True)
        self.deepspeed.eval()
        lengths = torch.tensor([5, 1, 3], device=self.device)
        ids = torch.arange(15, device=self.device).view(3, 5) % 7 + 1
        padded = self.read(ids, lengths, None).float()
        why = "without it the model says something else"
        try:
            packed = self.read(ids, lengths, 9).float()
            right = bool((packed - padded).norm() <= PACKED_TOLERANCE[self.spec["dtype"]] * padded.norm())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's own code says of one row
            right, why = False, first_line(error)
            self._unpack()
        self.deepspeed.train(self.spec["trains"])
        if not right:
            logger.warning("%s: rows are read with their padding, since %s", self.name, why)
        return right

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of a scalar loss, unscaled."""
        self.pulse(f"{self.name}: backward")
        finite = loss.detach().isfinite()
        self.finite = finite if self.finite is None else self.finite & finite
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        self._unpack()

    def overflows(self) -> bool:
        """Whether the accumulated gradients of an fp16 engine overflowed on any rank; False in other types.

        A collective call, once before `step` or `skip`: it sums the gradients over the ranks, which DeepSpeed does at
        the beginning of its step, and takes that part away from the next step.
        """
        if self.spec["dtype"] != "fp16":
            return False
        engine, optimizer = self.deepspeed, self.deepspeed.optimizer
        holder, name = engine, "allreduce_gradients"
        if engine.zero_optimization_partition_gradients():
            holder, name = optimizer, "finalize_gradient_accumulation_boundary"
        engine._running_engine_step = True  # as step() says first: a boundary of the accumulation
        getattr(holder, name)()
        setattr(holder, name, lambda *_: delattr(holder, name))
        optimizer.check_overflow()
        return bool(optimizer.overflow)

    def skip(self) -> dict[str, float]:
        """Drop the accumulated gradients of an fp16 engine; what `step` reports of a step that is not made.

        Its loss scale, which nothing was wrong with, stays. The update counts for its learning rate, as that of the
        engine that overflowed does.
        """
        optimizer = self.deepspeed.optimizer
        scale = dict(vars(optimizer.loss_scaler))
        optimizer.check_overflow = lambda *_, **__: setattr(optimizer, "overflow", True)
        try:
            self.deepspeed.step()
        finally:
            del optimizer.check_overflow
        vars(optimizer.loss_scaler).update(scale)
        self.updates += 1
        return {"lr": 0.0, "grad_norm": math.inf}

    def step(self) -> dict[str, float]:
        """Apply the accumulated gradients; returns the learning rate used and the gradient norm before clipping.

        Raises UserError when the loss or the gradient is not finite, but where fp16 skips such an update by itself.
        """
        self.pulse(f"{self.name}: step")
        rate = learning_rate(self.spec["schedule"], self.updates)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate * group.get("rate", 1.0)
        self.deepspeed.step()
        self.updates += 1
        found = self.deepspeed.get_global_grad_norm()
        norm = float(found) if found is not None else None
        self._check(norm)
        return {"lr": rate, "grad_norm": norm if norm is not None else float("nan")}

    def _check(self, norm: float | None) -> None:
        """End a run that learns nothing any more. The weights are spoilt by now, and no checkpoint is made of them."""
        finite, self.finite = self.finite, None
        if self.spec["deepspeed"]["fp16"]["enabled"]:
            return
        what = None
        if finite is not None and not finite:
            what = "loss"
        elif norm is not None and not 0 <= norm < math.inf:  # DeepSpeed says -1 for one that is not finite
            what = "gradient"
        if what is not None:
            raise UserError(
                "E0794", f"the {what} of `{self.name}` is not finite in its update {self.updates}",
                help="a lower lr, a longer warmup, or dtype = fp32",
            )  # fmt: skip

    def _clip(self) -> None:
        """Clip at stage 0, where DeepSpeed keeps no norm; left on the optimizer, it is reported as at other stages."""
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.deepspeed.gradient_clipping())
        self.deepspeed.optimizer._global_grad_norm = norm


class PolicyEngine(Engine):
    """A causal language model: log-probabilities of given tokens."""

    def read(self, ids: torch.Tensor, lengths: torch.Tensor, total: int | None) -> torch.Tensor:
        rows, columns = length_mask(lengths, ids.shape[1]).nonzero(as_tuple=True)
        logits, places = self.logits_at(ids, lengths, rows, columns, total=total)
        return logits if places is None else logits[places]

    def logits(self, ids: torch.Tensor, lengths: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Logits [B, T - first, V] in the model's dtype for right-padded `ids` [B, T], of the columns from `first` on.

        The output matrix is not applied to the columns before it, where the model's class can leave them out.
        """
        self.pulse(f"{self.name}: forward")
        self.wake()
        self._unpack()
        inputs = forward_inputs(self.module, ids, lengths)
        if first and takes(type(self.module), "logits_to_keep"):
            return self.deepspeed(**inputs, logits_to_keep=ids.shape[1] - first).logits
        return self.deepspeed(**inputs).logits[:, first:]

    def logits_at(
        self, ids: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, first: int = 0,
        total: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Logits in the model's dtype for right-padded `ids` [B, T], among them those at `rows` and `columns` [M].

        first: the least of the columns. total: tokens of the rows; where it is given and the engine packs, the padding
        is not computed, and the output matrix is applied to the M alone. Returns logits [L, V], and which of the L are
        the M, None where all are, in their order.
        """
        packing = self.packing(lengths, ids.shape[1], total) if len(rows) else None
        if packing is None:
            logits = self.logits(ids, lengths, first)
            return logits.flatten(0, 1), rows * logits.shape[1] + columns - first
        self.pulse(f"{self.name}: forward")
        self.wake()
        inputs, places = packed_inputs(ids, packing), packing.indices(rows, columns)
        with self._packed(packing):
            if takes(type(self.module), "logits_to_keep"):
                return self.deepspeed(**inputs, logits_to_keep=places).logits[0], None
            return self.deepspeed(**inputs).logits[0], places


class ScalarEngine(Engine):
    """A reward or value model: one number for each position, less `mean` and over `deviation`."""

    mean, deviation = 0.0, 1.0

    def read(self, ids: torch.Tensor, lengths: torch.Tensor, total: int | None) -> torch.Tensor:
        return self.scalars(ids, lengths, total)[length_mask(lengths, ids.shape[1])]

    def scalars(self, ids: torch.Tensor, lengths: torch.Tensor, total: int | None = None) -> torch.Tensor:
        """fp32 [B, T] for right-padded `ids` [B, T]; entry t has read tokens 0 to t.

        total: tokens of the rows; where it is given and the engine packs, the padding is not computed.
        """
        self.pulse(f"{self.name}: forward")
        self.wake()
        packing = self.packing(lengths, ids.shape[1], total)
        with self._packed(packing):
            return (self.deepspeed(ids, lengths, packing) - self.mean) / self.deviation

    def scores(self, ids: torch.Tensor, lengths: torch.Tensor, total: int | None = None) -> torch.Tensor:
        """fp32 [B]: the scalar at the last real token of each row. total: as of `scalars`."""
        return at_last(self.scalars(ids, lengths, total), lengths)


def _groups(module: nn.Module, spec: dict) -> list[dict]:
    """What trains, in groups of one weight decay and one rate.

    Weight decay is for matrices only: biases, norms and other vectors keep their scale. `rate` multiplies the schedule
    of adapters whose learning rate is not the head's. Matrices come first, so that in ZeRO's flat buffers those of one
    layer lie side by side (rollout/fusing.py reads them as one).
    """
    decay = spec["deepspeed"]["optimizer"]["params"]["weight_decay"]
    lora = spec["lora"]
    rate = lora["lr"] / spec["schedule"]["lr"] if lora is not None and lora["lr"] is not None else 1.0
    groups: dict[tuple[float, float], list[torch.Tensor]] = {}
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    for name, parameter in sorted(trained, key=lambda named: not _is_matrix(named[1])):
        key = decay if _is_matrix(parameter) else 0.0, rate if ".lora_" in name else 1.0
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": params, "weight_decay": decay, "rate": rate} for (decay, rate), params in groups.items()
    ]


def _is_matrix(parameter: torch.Tensor) -> bool:
    return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
