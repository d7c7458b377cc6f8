"""Products that wait for what follows them, with a slow computer of products in place of the kernels."""

import pytest
import torch
from rollouts import TYPES, tiny_model
from torch import distributed, nn
from torch.nn import functional

from rlhfdsl.engines.rollout.fusing import forwards
from rlhfdsl.engines.rollout.peephole import Peephole


class Slow:
    """Computes in torch and notes what it was asked for."""

    functions = {"relu": torch.relu, "silu": functional.silu, "gelu": functional.gelu}

    def __init__(self, few=True):
        self.calls = []
        self.adapters = 0
        self.few = few

    def takes_product(self, x, weight, bias):
        return self.few

    def takes_norm(self, x, weight):
        return True

    def takes_adapter(self, x, adapter):
        return True

    def product(self, x, weight, bias, adapter, activation, added, out):
        self.calls.append((activation, added is not None))
        value = functional.linear(x, weight, bias)
        if adapter is not None:
            value = self.adapted(value, x, adapter)
        if activation == "gelu_tanh":
            value = functional.gelu(value, approximate="tanh")
        elif activation is not None:
            value = self.functions[activation](value)
        out.copy_(value if added is None else value + added)

    def adapted(self, base, x, adapter):
        self.adapters += 1
        return base + adapter.factor * (x @ adapter.down.T @ adapter.up.T)

    def layer_norm(self, x, weight, bias, eps, added=None, total=None):
        self.calls.append("norm" if added is None else "norm of a sum")
        x = x if added is None else total.copy_(x + added)
        return functional.layer_norm(x, weight.shape, weight, bias, eps)

    def rms_norm(self, x, weight, eps, added=None, total=None):
        self.calls.append("norm" if added is None else "norm of a sum")
        x = x if added is None else total.copy_(x + added)
        return functional.rms_norm(x, weight.shape, weight, eps)

    def activated(self, x, activation, factor, out):
        self.calls.append((activation, "alone" if factor is None else "times"))
        value = functional.gelu(x, approximate="tanh") if activation == "gelu_tanh" else self.functions[activation](x)
        out.copy_(value if factor is None else value * factor)

    def takes_rows(self, x):
        return True


def same_logits(kernels, model, ids, monkeypatch):
    """A model whose forwards compute with these kernels, adapters and weights in 4 bits among them, gives its own."""
    mode = Peephole(kernels)
    with torch.no_grad():
        expected = model(ids).logits
        for module, forward in forwards(model, mode):
            monkeypatch.setattr(module, "forward", forward)
        with mode:
            found = model(ids).logits
    torch.testing.assert_close(found, expected)


@pytest.fixture
def slow():
    return Slow()


LAYER, X = nn.Linear(8, 8), torch.arange(24.0).view(3, 8) / 24


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("name", TYPES)
def test_the_logits_of_every_type_are_those_of_its_own_forward(name, few):
    slow = Slow(few)
    model = tiny_model(name).eval()
    ids = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
        with Peephole(slow):
            found = model(ids).logits
    torch.testing.assert_close(found, expected)
    assert slow.calls


def test_an_opt_layer_is_four_products_and_two_norms(slow):
    model = tiny_model("opt").eval()
    layer = model.get_decoder().layers[0]
    with torch.no_grad(), Peephole(slow):
        layer(torch.randn(1, 1, model.config.hidden_size))
    products = [call for call in slow.calls if call != "norm"]
    assert products[-3:] == [(None, True), ("relu", False), (None, True)] and slow.calls.count("norm") == 2


def test_in_many_rows_a_norm_takes_the_sum_before_it():
    slow = Slow(few=False)
    model = tiny_model("opt").eval()
    x = torch.randn(2, 3, model.config.hidden_size)
    layer = model.get_decoder().layers[0]
    with torch.no_grad():
        expected = layer(x)
        with Peephole(slow):
            found = layer(x)
    torch.testing.assert_close(found, expected)
    assert slow.calls == ["norm", "norm of a sum", ("relu", "alone")]


@torch.no_grad()
def test_a_sum_is_there_beside_its_norm():
    slow = Slow(few=False)
    y, weight = X.flip(0), torch.linspace(0.5, 2, 8)
    with Peephole(slow) as mode:
        total = X + y
        normed = mode.rms_norm(total.view(1, 3, 8), weight, 1e-6)
        later = X + y
        other = mode.rms_norm(later[:2], weight, 1e-6)  # of a part of it
    assert slow.calls == ["norm of a sum", "norm"]
    torch.testing.assert_close(total, X + y)
    torch.testing.assert_close(normed, functional.rms_norm(X + y, (8,), weight, 1e-6).view(1, 3, 8))
    torch.testing.assert_close(later, X + y)
    torch.testing.assert_close(other, functional.rms_norm((X + y)[:2], (8,), weight, 1e-6))


@torch.no_grad()
def test_a_product_takes_the_activation_before_it():
    slow = Slow(few=False)
    gate, up = X.flip(0), X + 1
    with Peephole(slow):
        out = functional.silu(gate) * up
    torch.testing.assert_close(out, functional.silu(gate) * up)
    assert slow.calls == [("silu", "times")]
    with Peephole(slow):
        active = functional.silu(gate)
        out = up * active
        square = functional.silu(gate) * 2.0
    torch.testing.assert_close(active, functional.silu(gate))
    torch.testing.assert_close(out, functional.silu(gate) * up)
    torch.testing.assert_close(square, functional.silu(gate) * 2)
    assert slow.calls[1:] == [("silu", "alone"), ("silu", "times"), ("silu", "alone")]


@torch.no_grad()
def test_what_follows_goes_along_and_what_does_not_is_not_taken(slow):
    with Peephole(slow):
        out = X + functional.relu(LAYER(X))
    torch.testing.assert_close(out, X + functional.relu(LAYER(X)))
    assert slow.calls == [("relu", True)]
    with Peephole(slow):
        out = functional.relu(LAYER(X) + X)  # an activation after a sum
        wide = LAYER(X) + X[0]  # a sum that broadcasts
    torch.testing.assert_close(out, functional.relu(LAYER(X) + X))
    torch.testing.assert_close(wide, LAYER(X) + X[0])
    assert slow.calls[1:] == [(None, True), ("relu", "alone"), (None, False)]
    with Peephole(slow):
        twice = torch.add(LAYER(X), X, alpha=2)
    torch.testing.assert_close(twice, LAYER(X) + 2 * X)


@torch.no_grad()
def test_an_output_that_is_used_again_is_there(slow):
    with Peephole(slow):
        plain = LAYER(X)
        active = functional.silu(plain)
        out = active + X
    torch.testing.assert_close(plain, LAYER(X))
    torch.testing.assert_close(active, functional.silu(plain))
    torch.testing.assert_close(out, active + X)
    with Peephole(slow):
        plain = LAYER(X)
        out = functional.gelu(plain, approximate="tanh") + plain
    torch.testing.assert_close(out, functional.gelu(LAYER(X), approximate="tanh") + LAYER(X))


@torch.no_grad()
def test_operands_that_change_later_are_read_before(slow):
    with Peephole(slow):
        residual = X.clone()
        out = LAYER(X) + residual
        residual.zero_()
    torch.testing.assert_close(out, LAYER(X) + X)


@torch.no_grad()
def test_a_view_of_an_output_is_of_the_last(slow):
    with Peephole(slow):
        out = LAYER(X)
        flat = out.view(-1)
        out = out + X
    torch.testing.assert_close(flat, LAYER(X).view(-1))
    torch.testing.assert_close(out, LAYER(X) + X)
    with Peephole(slow):
        out = (X + LAYER(X)).reshape(-1)
    torch.testing.assert_close(out, (X + LAYER(X)).reshape(-1))


@torch.no_grad()
def test_a_sum_over_ranks_is_of_what_was_computed(slow, monkeypatch):
    seen = []
    monkeypatch.setattr(distributed.distributed_c10d, "_rank_not_in_group", lambda group: seen.append(list(slow.calls)))
    monkeypatch.setattr(distributed.distributed_c10d, "_get_default_group", lambda: Group())

    class Group:
        def allreduce(self, tensors, options):
            seen.append((list(slow.calls), tensors[0].clone()))

    with Peephole(slow):
        distributed.all_reduce(LAYER(X), async_op=True)
    assert seen[-1][0] == [(None, False)]
    torch.testing.assert_close(seen[-1][1], LAYER(X))


@torch.no_grad()
def test_two_products_in_a_row(slow):
    with Peephole(slow):
        out = LAYER(LAYER(X)) + LAYER(X)
    torch.testing.assert_close(out, LAYER(LAYER(X)) + LAYER(X))
    assert slow.calls == [(None, False), (None, False), (None, True)]
