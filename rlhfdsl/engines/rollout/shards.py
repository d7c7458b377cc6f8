"""One rank's shard of a model: which part of each parameter it holds, and what its modules are told.

The rules are data (planning/shards.json). What they do not name (embeddings, norms, the output matrix) every rank holds
whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhfdsl.models.lora import NAME
from rlhfdsl.planning.shards import Rules


@dataclass(frozen=True)
class Cut:
    """The part of one parameter that rank `rank` of `size` holds.

    dim: the dimension that is cut, each of its `pieces` (lengths, in order) by itself. None: the whole parameter is
    held, by the first rank only; the others have zeros, so that a sum over the ranks has it once.
    """

    size: int
    rank: int
    dim: int | None
    pieces: tuple[int, ...] = ()

    def shape(self, whole: torch.Size) -> torch.Size:
        """The shape of the part."""
        if self.dim is None:
            return whole
        return torch.Size(n // self.size if dim == self.dim else n for dim, n in enumerate(whole))

    def take(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Copy this rank's part of `whole` to `part`."""
        if self.dim is not None:
            pieces = whole.split(self.pieces, self.dim)
            torch.cat([piece.chunk(self.size, self.dim)[self.rank] for piece in pieces], self.dim, out=part)
        elif self.rank == 0:
            part.copy_(whole)
        else:
            part.zero_()


def cuts(model: PreTrainedModel, rules: Rules, size: int, rank: int) -> dict[str, Cut]:
    """The cut of every parameter of a whole model that is not held whole, by its name; adapters as their layer."""
    found = {}
    for path, module in model.named_modules():
        name, base = _match(path, rules.column + rules.row), path
        if name is None:
            continue
        if isinstance(module, LoraLayer):
            base, inner = f"{path}.base_layer", module.base_layer
        else:
            inner = module
        outputs, inputs = (1, 0) if isinstance(inner, Conv1D) else (0, 1)
        column = name in rules.column
        pieces = _pieces(model, rules.pieces.get(name, (1,)), inner.weight.shape[outputs if column else inputs])
        found[f"{base}.weight"] = Cut(size, rank, outputs if column else inputs, pieces)
        if inner.bias is not None:
            found[f"{base}.bias"] = Cut(size, rank, 0, pieces) if column else Cut(size, rank, None)
        if isinstance(module, LoraLayer):
            # base + B A: the outputs are B's rows, the inputs A's columns, and a sum of the whole is the sum of both
            adapter = f"{path}.lora_B.{NAME}.weight" if column else f"{path}.lora_A.{NAME}.weight"
            found[adapter] = Cut(size, rank, 0 if column else 1, pieces)
    return found


def adjust(model: PreTrainedModel, rules: Rules, size: int, total: Callable[[torch.Tensor], None]) -> None:
    """Make the modules of a model that has the parts of one rank compute with them.

    total: sums a tensor over the ranks in place; it is called with the output of every row layer.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, Conv1D):
            module.nx, module.nf = module.weight.shape
        for entry in rules.divide:
            place, _, attribute = entry.partition(".")
            if path.endswith("." + place):
                _divide(module, attribute, size)
        if _match(path, rules.row) is not None:
            module.register_forward_hook(lambda module, inputs, output: total(output))


def _match(path: str, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if path.endswith("." + name)), None)


def _pieces(model: PreTrainedModel, shares: tuple[int | str, ...], length: int) -> tuple[int, ...]:
    """Lengths of the pieces of a dimension."""
    config = model.config.get_text_config()
    counts = {"heads": config.num_attention_heads, "kv_heads": getattr(config, "num_key_value_heads", None)}
    each = [share if isinstance(share, int) else counts[share] for share in shares]
    return tuple(length * share // sum(each) for share in each)


def _divide(module: nn.Module, attribute: str, size: int) -> None:
    """Divide a number of a module, or of its configuration, of which it then has its own copy."""
    holder: object = module
    if attribute.startswith("config."):
        attribute = attribute.removeprefix("config.")
        holder = module.config = copy.deepcopy(module.config)
    if hasattr(holder, attribute):
        setattr(holder, attribute, getattr(holder, attribute) // size)
