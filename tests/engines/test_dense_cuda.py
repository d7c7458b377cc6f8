"""Products and norms of a decode step on a CUDA device, beside torch in fp32."""

import pytest
import torch
from torch.nn import functional

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
ACTIVATIONS = {
    None: lambda x: x,
    "relu": torch.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@pytest.fixture
def dense():
    from rlhfdsl.engines.rollout.kernels import dense

    return dense


def random(*shape, dtype):
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 1040, 256), (16, 2048, 8192), (17, 8200, 2048), (32, 50272, 512)])
@pytest.mark.parametrize("more", [False, True])
def test_products(dense, rows, n, k, activation, more, dtype):
    x, weight = random(rows, 1, k, dtype=dtype), random(n, k, dtype=dtype) * k**-0.5
    bias, added = (random(n, dtype=dtype), random(rows, 1, n, dtype=dtype)) if more else (None, None)
    assert dense.takes_product(x, weight, bias)
    out = torch.full((rows, 1, n), torch.nan, dtype=dtype, device="cuda")
    dense.product(x, weight, bias, None, activation, added, out)
    expected = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    expected = ACTIVATIONS[activation](expected)
    expected = (expected if added is None else expected + added).to(dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected, atol=eps, rtol=eps)  # the last bit


def adapter(n, k, rank, dtype):
    from rlhfdsl.engines.rollout.operands import Adapter

    return Adapter(random(rank, k, dtype=dtype) * k**-0.5, random(n, rank, dtype=dtype), 0.5)


def lowered(x, beside):
    """What an adapter adds, in fp64, the middle rounded."""
    low = functional.linear(x.double(), beside.down.double()).to(x.dtype).double()
    return beside.factor * functional.linear(low, beside.up.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "n", "k", "rank"), [(1, 1040, 256, 4), (9, 2048, 8192, 16), (32, 8200, 2048, 64)])
@pytest.mark.parametrize("more", [False, True])
def test_products_with_an_adapter(dense, rows, n, k, rank, more, dtype):
    x, weight = random(rows, 1, k, dtype=dtype), random(n, k, dtype=dtype) * k**-0.5
    bias, added = (random(n, dtype=dtype), random(rows, 1, n, dtype=dtype)) if more else (None, None)
    beside = adapter(n, k, rank, dtype)
    assert dense.takes_product(x, weight, bias) and dense.takes_adapter(x, beside)
    out = torch.full((rows, 1, n), torch.nan, dtype=dtype, device="cuda")
    dense.product(x, weight, bias, beside, "relu" if more else None, added, out)
    expected = functional.linear(x.double(), weight.double(), bias.double() if more else None) + lowered(x, beside)
    expected = (torch.relu(expected) + added if more else expected).to(dtype)
    eps = torch.finfo(dtype).eps  # a middle that is rounded the other way counts for less
    torch.testing.assert_close(out, expected, atol=4 * eps, rtol=2 * eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "n", "k", "rank"), [(5, 1000, 100, 3), (128, 4096, 11_008, 16), (300, 64, 1024, 64)])
def test_an_adapter_beside_any_output(dense, rows, n, k, rank, dtype):
    x, base, beside = random(rows, 1, k, dtype=dtype), random(rows, 1, n, dtype=dtype), adapter(n, k, rank, dtype)
    expected = (base.double() + lowered(x, beside)).to(dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(dense.adapted(base, x, beside), expected, atol=4 * eps, rtol=2 * eps)


def packed(n, k):
    """Weights in 4 bits, and what they stand for exactly, in fp64."""
    from bitsandbytes.functional import quantize_4bit

    from rlhfdsl.engines.rollout.kernels.packed import NF4
    from rlhfdsl.engines.rollout.operands import Packed

    whole = random(n, k, dtype=torch.bfloat16) * k**-0.5
    codes, state = quantize_4bit(whole, quant_type="nf4", blocksize=64, compress_statistics=True)
    found = Packed(codes, state.absmax, state.state2.code, state.state2.absmax, state.offset, state.shape)
    scales = found.table[found.scales.long()] * found.maxima.repeat_interleave(256)[: len(found.scales)] + found.offset
    each = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], -1).flatten().long()
    values = torch.tensor(NF4, dtype=torch.float64, device="cuda")[each].view(-1, 64) * scales.double()[:, None]
    return found, values.view(n, k)


@pytest.mark.parametrize(
    ("rows", "n", "k"), [(1, 64, 256), (8, 1040, 1024), (16, 9216, 9216), (17, 4104, 2048), (32, 4096, 512)]
)
@pytest.mark.parametrize("more", [False, True])
def test_products_with_weights_in_4_bits(dense, rows, n, k, more):
    pytest.importorskip("bitsandbytes")
    dtype = torch.bfloat16
    x, (weight, exact) = random(rows, 1, k, dtype=dtype), packed(n, k)
    bias, added = (random(n, dtype=dtype), random(rows, 1, n, dtype=dtype)) if more else (None, None)
    beside = adapter(n, k, 16, dtype) if more else None
    assert dense.takes_product(x, weight, bias)
    out = torch.full((rows, 1, n), torch.nan, dtype=dtype, device="cuda")
    dense.product(x, weight, bias, beside, "relu" if more else None, added, out)
    expected = functional.linear(x.double(), exact)
    if more:
        expected = torch.relu(expected + bias + lowered(x, beside)) + added
    # each of the sixteen values is off by two thousandths at most, some up and some down
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, atol=2 * eps, rtol=2 * eps)


@pytest.mark.parametrize("width", [64, 100, 2048, 14336])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms(dense, width, dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight, bias = 3 * random(5, 1, width, dtype=dtype) + 1, random(width, dtype=dtype), random(width, dtype=dtype)
    eps = torch.finfo(dtype).eps
    for b in (bias, None):
        expected = functional.layer_norm(x, (width,), weight, b, 1e-5)
        torch.testing.assert_close(dense.layer_norm(x, weight, b, 1e-5), expected, atol=2 * eps, rtol=2 * eps)
    module = LlamaRMSNorm(width).to("cuda", dtype)
    module.weight.data.copy_(weight)
    torch.testing.assert_close(dense.rms_norm(x, weight, 1e-6), module(x), atol=0, rtol=2 * eps)


@pytest.mark.parametrize("rows", [3, 128])
@pytest.mark.parametrize("width", [100, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_a_sum(dense, rows, width, dtype):
    x, y, weight = (random(*shape, dtype=dtype) for shape in ((rows, 1, width), (rows, 1, width), (width,)))
    for norm in (lambda x, **along: dense.layer_norm(x, weight, weight, 1e-5, **along),
                 lambda x, **along: dense.rms_norm(x, weight, 1e-6, **along)):  # fmt: skip
        total = torch.full_like(x, torch.nan)
        found = norm(x, added=y, total=total)
        assert torch.equal(total, x + y) and torch.equal(found, norm(x + y))


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name])
@pytest.mark.parametrize("width", [100, 2048, 8200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_of_a_part(dense, activation, width, dtype):
    gate, up = random(17, 1, 2 * width, dtype=dtype).split(width, -1)
    eps = torch.finfo(dtype).eps
    expected = ACTIVATIONS[activation](gate.float()).to(dtype)
    out = torch.empty(17, 1, width, dtype=dtype, device="cuda")
    dense.activated(gate, activation, None, out)
    torch.testing.assert_close(out, expected, atol=eps, rtol=2 * eps)
    dense.activated(gate, activation, up, out)
    torch.testing.assert_close(out, expected * up, atol=4 * eps, rtol=4 * eps)


def test_a_chain_of_early_launches_is_in_order(dense):
    """Each product reads what the one before wrote, in a captured graph as in a decode step."""
    weights = [random(2048, 2048, dtype=torch.bfloat16) * 2048**-0.5 for _ in range(20)]
    bias = random(2048, dtype=torch.bfloat16)
    x = random(16, 2048, dtype=torch.bfloat16)
    outs = [torch.empty_like(x) for _ in weights]

    def chain():
        last = x
        for weight, out in zip(weights, outs, strict=True):
            dense.product(dense.layer_norm(last, bias, bias, 1e-5), weight, bias, None, "relu", last, out)
            last = out

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    for _ in range(20):
        x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        found = [out.clone() for out in outs]
        last = x
        for weight, out in zip(weights, found, strict=True):
            expected = torch.empty_like(x)
            normed = dense.layer_norm(last, bias, bias, 1e-5)
            torch.cuda.synchronize()
            dense.product(normed, weight, bias, None, "relu", last, expected)
            torch.cuda.synchronize()
            assert torch.equal(out, expected)
            last = out
