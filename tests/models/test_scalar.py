"""Reward and value models."""

from __future__ import annotations

import torch
from small import scratch, spec

from rlhfdsl.models.loading import load_model


def test_ids_that_only_the_actor_has_read_the_last_row(tmp_path):
    """Models of one tokenizer differ in their padding rows; an actor now and then samples one of its own."""
    critic = load_model(spec("critic"), scratch(tmp_path / "small", vocab=270), revision=None, seed=1).eval()
    ids, lengths = torch.tensor([[5, 269, 7, 8], [270, 6, 299, 0]]), torch.tensor([4, 3])
    with torch.no_grad():
        found = critic(ids, lengths)
        expected = critic(torch.tensor([[5, 269, 7, 8], [269, 6, 269, 0]]), lengths)
        other = critic(torch.tensor([[5, 268, 7, 8], [268, 6, 268, 0]]), lengths)
    assert torch.equal(found[1, :3], expected[1, :3]) and torch.equal(found[0], expected[0])
    assert not torch.equal(found, other)
