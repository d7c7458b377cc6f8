"""Projections of one input as one product, over the weights that train."""

from functools import partial

import pytest
import torch
from rollouts import learn, sampled, tiny
from torch.nn import functional

from rlhfdsl.engines.rollout.eager import EagerSampler
from rlhfdsl.engines.rollout.fusing import fused, products
from rlhfdsl.engines.rollout.graph import GraphSampler

IDS = torch.arange(1, 25).view(2, 12)


def logits(engine):
    engine.eval()
    with torch.no_grad():
        return engine.module(IDS).logits


@pytest.mark.parametrize(("name", "groups"), [("llama", 4), ("opt", 2), ("qwen2", 4), ("gpt2", 0)])
def test_siblings_in_a_flat_buffer_are_one_product(name, groups):
    """Two layers; queries, keys and values, and a gated MLP's gate and up. ZeRO 1 lays matrices side by side."""
    engine = tiny(name, zero=1)
    assert len(products(engine.module)) == groups
    for _ in range(2):
        expected = logits(engine)
        with fused(engine.module, compiled=False):
            torch.testing.assert_close(logits(engine), expected, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(logits(engine), expected)  # as it was
        learn(engine)


def test_products_are_torchs_own_for_the_time(monkeypatch):
    """After an engine at ZeRO 3 `linear` is DeepSpeed's, which no capture should hold."""
    engine = tiny("llama")
    other = partial(torch._C._nn.linear)
    monkeypatch.setattr(functional, "linear", other)
    with fused(engine.module, compiled=False):
        assert functional.linear is torch._C._nn.linear
    assert functional.linear is other


def test_weights_apart_stay_apart():
    engine = tiny("llama")  # ZeRO 0: every parameter has its own storage
    assert products(engine.module) == []


def test_a_whole_copy_of_shards_lies_side_by_side():
    engine = tiny("qwen2", zero=3)
    sampler = GraphSampler(engine)
    found = sampled(sampler)
    assert len(products(sampler.model)) == 4
    with fused(sampler.model, compiled=False):
        again = sampled(sampler)
    assert torch.equal(again.input_ids, found.input_ids)
    assert torch.equal(found.input_ids, sampled(EagerSampler(engine)).input_ids)


def test_adapters_are_not_passed_over():
    lora = {"rank": 4, "alpha": 64.0, "dropout": 0.0, "targets": ["q_proj"], "lr": None}
    sampler = GraphSampler(tiny("llama", zero=3, lora=lora))
    assert {layer.out_features for product in products(sampler.model) for layer in product.layers} == {128}
