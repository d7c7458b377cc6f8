"""ZeRO 3 with the weights of a layer gathered together, and its linear layers, beside whole weights and torch's."""

import pytest
import torch
from deepspeed import zero
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from rollouts import LORA, learn, tiny
from small import engine as loaded
from small import scratch, spec
from torch.multiprocessing.reductions import StorageWeakRef

from rlhfdsl.engines import gathering
from rlhfdsl.engines.engine import ScalarEngine


def weights(engine) -> dict[str, torch.Tensor]:
    with zero.GatheredParameters(list(engine.module.parameters())):
        return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox", "bloom", "falcon"])
@pytest.mark.parametrize("lora", [None, LORA])
def test_updates_are_those_of_whole_weights(name, lora):
    """Of adapters too, where the input of the first layer needs no gradient."""
    ends = []
    for stage in (0, 3):
        engine = tiny(name, zero=stage, lora=lora, lr=0.01, kept=0 if stage == 3 else None)
        before = weights(engine)
        for _ in range(3):
            learn(engine)
        ends.append(weights(engine))
        trained = [key for key, parameter in engine.module.named_parameters() if parameter.requires_grad]
        assert all(not torch.equal(before[key], ends[-1][key]) for key in trained)
    for key, whole in ends[0].items():
        torch.testing.assert_close(ends[1][key], whole, atol=2e-4, rtol=1e-3)


def visited(monkeypatch, engine, read) -> list[str]:
    """The modules for which DeepSpeed gathers in a pass, by their class."""
    found: list[str] = []
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def noted(self, module, forward):
        found.append(type(module).__name__)
        return fetch(self, module, forward)

    monkeypatch.setattr(PartitionedParameterCoordinator, "fetch_sub_module", noted)
    engine.eval()
    with torch.no_grad():
        read(torch.ones(2, 8, dtype=torch.int64), torch.full((2,), 8))
    monkeypatch.undo()
    return found


def test_a_layer_is_gathered_at_once(monkeypatch):
    engine = tiny("llama", zero=3, kept=0)
    found = visited(monkeypatch, engine, engine.logits)
    assert found.count("LlamaDecoderLayer") == 2 and "LlamaMLP" not in found and found.count("Linear") == 1  # the head


@pytest.mark.parametrize("trains", [True, False])
def test_layers_inside_a_scalar_model_are_found(tmp_path, monkeypatch, trains):
    critic = loaded(ScalarEngine, scratch(tmp_path / "small"), spec("critic", zero=3, trains=trains))
    found = visited(monkeypatch, critic, critic.scalars)
    assert found.count("LlamaDecoderLayer") == 2 and "LlamaMLP" not in found


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, True), (True, False, False), (True, True, False)])
def test_the_linear_layer_is_that_of_torch(shape, biased, needs):
    draw = torch.Generator().manual_seed(3)
    made = [torch.randn(size, generator=draw, dtype=torch.float64) for size in (shape, (4, 5), (4,))]
    weighting = torch.randn(*shape[:-1], 4, generator=draw, dtype=torch.float64)
    ends = []
    for multiply in (gathering.TORCH, gathering.linear):
        x, weight, bias = (value.clone().requires_grad_(need) for value, need in zip(made, needs, strict=True))
        out = multiply(x, weight, bias if biased else None)
        (out * weighting).sum().backward()
        ends.append((out.detach(), x.grad, weight.grad, bias.grad))
    for ours, theirs in zip(*ends, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    with torch.no_grad():
        assert torch.equal(gathering.linear(made[0], made[1], made[2] if biased else None), ends[1][0])


@pytest.mark.parametrize(("multiply", "kept"), [(gathering.linear, False), (gathering.TORCH, True)])
def test_the_linear_layer_keeps_no_gathered_weight(multiply, kept):
    """The parameter is let go after the forward pass, and gathered to another place before the backward pass."""
    weight = torch.nn.Parameter(torch.randn(4, 5))
    x, whole = torch.randn(3, 5, requires_grad=True), weight.data.clone()
    storage = StorageWeakRef(weight.data.untyped_storage())
    out = multiply(x, weight)
    weight.data = torch.empty(0)
    assert storage.expired() != kept
    weight.data = whole
    out.sum().backward()
    torch.testing.assert_close(x.grad, whole.sum(0).expand(3, 5))


def test_engines_at_zero_3_multiply_with_it():
    tiny("llama", zero=3)
    assert torch.nn.functional.linear is gathering.linear
