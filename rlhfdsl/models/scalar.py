"""Reward and value models: a decoder backbone with a scalar head on every position."""

from __future__ import annotations

import math
from types import MethodType

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhfdsl.models.inputs import forward_inputs, packed_inputs
from rlhfdsl.models.packing import Packing

HEAD = "score.weight"  # the name that every sequence-classification class of transformers gives its head


class ScalarModel(nn.Module):
    """One number for each position of a sequence, from transformers' sequence-classification class of the model.

    The class is only the container of the weights (so that what is saved loads in plain transformers); its own
    pooling, which looks for pad ids, is not used. A reward is read at the last real token by length, a value at
    every position.
    """

    def __init__(self, classifier: PreTrainedModel):
        super().__init__()
        self.classifier = classifier
        classifier.score.forward = MethodType(_in_fp32, classifier.score)  # a module's call, which gathers at ZeRO 3

    @property
    def config(self):
        return self.classifier.config

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor, packing: Packing | None = None) -> torch.Tensor:
        """Scalars in fp32, shape [B, T], for right-padded `ids` [B, T] with `lengths` [B].

        packing: of these rows, where they are to be read without their padding. Entries at and beyond a row's length
        are meaningless. An id beyond the last row of the embedding reads that row:
        an actor of the same tokenizer can have more padding rows, and samples one of them once in a while.
        """
        backbone = getattr(self.classifier, self.classifier.base_model_prefix)
        ids = ids.clamp(max=self.config.get_text_config().vocab_size - 1)
        inputs = forward_inputs(backbone, ids, lengths) if packing is None else packed_inputs(ids, packing)
        scalars = self.classifier.score(backbone(**inputs).last_hidden_state).squeeze(-1)
        return scalars if packing is None else packing.spread(scalars)

    def gradient_checkpointing_enable(self) -> None:
        self.classifier.gradient_checkpointing_enable({"use_reentrant": False})


def _in_fp32(head: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """The head's product in fp32, [B, T, d] -> [B, T, 1].

    In the model's own type the sum would be rounded to it: a bf16 score of 5 to steps of 1/32, which is more than all
    else in a forward adds and as much as answers of one prompt differ by.
    """
    return hidden.float() @ head.weight.float().T


def at_last(scalars: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The entry at the last real token of each row: [B, T], [B] -> [B]."""
    return scalars.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1)


@torch.no_grad()
def reset_head(weight: torch.Tensor, seed: int) -> None:
    """Fill a head [1, d] from N(0, 1/(d+1)), i.e. with standard deviation 1/sqrt(d+1).

    Source: Stiennon et al. 2020, and Huang et al. 2024 (arXiv 2403.17031), detail 12. The draw is made in fp32 on the
    CPU, so that it does not depend on the device or the parallelism.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[-1] + 1)
    weight.copy_(draw.to(weight.dtype))
