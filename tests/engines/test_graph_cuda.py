"""The graph rollout and its kernels on a CUDA device, beside `generate` and torch. One command: `make test-gpu`."""

from dataclasses import fields

import pytest
import torch
from rollouts import LORA, PROMPTS, TYPES, judged, learn, same, sampled, tiny
from small import engine as loaded
from small import one_rank, scratch, spec
from torch.nn.attention import SDPBackend

from rlhfdsl.engines.hybrid import HybridEngine
from rlhfdsl.engines.rollout.attention import decode
from rlhfdsl.engines.rollout.eager import EagerSampler
from rlhfdsl.engines.rollout.graph import GraphSampler
from rlhfdsl.engines.rollout.sampling import gumbel, row_seeds
from rlhfdsl.engines.rollout.slots import Slots
from rlhfdsl.models import quantized

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def exact_fp32():
    torch.backends.cuda.matmul.allow_tf32 = False


def on_gpu(name, dtype="fp32", zero=0, **changes):
    return tiny(name, dtype, zero, device="cuda", **changes)


@pytest.mark.parametrize("name", TYPES)
def test_captured_steps_equal_generate_before_and_after_updates(name):
    engine = on_gpu(name)
    graph, eager = GraphSampler(engine), EagerSampler(engine)
    options = {"answers": 3, "tokens": 70}
    first = sampled(eager, **options)
    same(sampled(graph, **options), first, 1e-3)
    captured = dict(graph.captured)
    assert graph.capture_failure is None and len(captured) == 1 and graph.compiled
    for _ in range(2):
        learn(engine)
        after = sampled(eager, **options)
        assert not torch.equal(after.log_probs, first.log_probs)
        same(sampled(graph, **options), after, 1e-3)
    same(sampled(graph, **options, at_once=8), after, 1e-3)
    assert captured.items() <= graph.captured.items()  # replayed, not captured again


@pytest.mark.parametrize("name", TYPES)
def test_bf16_is_as_near_to_the_scores_as_generate(name):
    engine = on_gpu(name, "bf16", 1)
    for _ in range(2):
        found = judged(engine, GraphSampler(engine))
        assert found.holds, found
        learn(engine)


@pytest.mark.parametrize("name", ["llama", "bloom", "falcon of groups"])
@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("zero", [1, 3])
def test_in_place_or_gathered_with_adapters_or_without(name, zero, lora):
    engine = on_gpu(name, zero=zero, lora=lora)
    graph, eager = GraphSampler(engine), EagerSampler(engine)
    for _ in range(2):
        same(sampled(graph), sampled(eager), 1e-3)
        learn(engine)
    assert len(graph.captured) == 1


@pytest.mark.parametrize("arch", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("rows", [2, 24])  # fewer and more than bitsandbytes reads in one kernel with the product
def test_captured_steps_over_a_base_in_4_bits(tmp_path, arch, rows):
    one_rank()
    source = scratch(tmp_path / "model", type=arch, hidden=128, intermediate=256, kv_heads=4)
    entry = spec(lr=0.02, lora=LORA | {"base": "nf4"}, device="cuda")
    engine = loaded(HybridEngine, source, entry)
    before = {path: layer.weight.data.clone() for path, layer in quantized.layers(engine.module).items()}
    assert all(weight.is_cuda and weight.dtype == torch.uint8 for weight in before.values())
    graph, eager = GraphSampler(engine), EagerSampler(engine)
    for _ in range(3):
        found, expected = (sampled(sampler, PROMPTS[:2], answers=rows // 2) for sampler in (graph, eager))
        same(found, expected, 1e-3)
        learn(engine)
    assert graph.capture_failure is None and len(graph.captured) == 1
    assert all(torch.equal(layer.weight.data, before[path]) for path, layer in quantized.layers(engine.module).items())


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_bf16_over_a_base_in_4_bits_is_as_near_to_the_scores_as_generate(tmp_path, arch):
    one_rank()
    source = scratch(tmp_path / "model", type=arch, hidden=128, intermediate=256, kv_heads=4)
    entry = spec(zero=1, dtype="bf16", lr=1e-3, lora=LORA | {"base": "nf4"}, device="cuda")
    engine = loaded(HybridEngine, source, entry)
    for _ in range(2):
        found = judged(engine, GraphSampler(engine))
        assert found.holds, found
        learn(engine)


def test_attention_takes_each_shape_as_it_comes():
    on_gpu("llama")  # has joined the ranks
    query = torch.randn(2, 4, 37, 64, device="cuda", dtype=torch.bfloat16)
    chosen = torch._fused_sdp_choice(query, query, query, is_causal=True)
    assert chosen == SDPBackend.FLASH_ATTENTION.value


def attended(query, keys, values, lengths, *options):
    """The kernel's attention, which puts the last live column itself; it is checked to be there afterwards."""
    from rlhfdsl.engines.rollout.kernels import attending

    rows = torch.arange(len(query), device="cuda")
    last = (lengths - 1).clamp(min=0)
    newest = [x[rows, :, last].unsqueeze(2).clone() for x in (keys, values)]
    expected = [x.clone() for x in (keys, values)]
    for x in (keys, values):
        x[rows[lengths > 0], :, last[lengths > 0]] = torch.nan
    out = attending.attend(query, *newest, keys, values, lengths, *options)
    for x, before in zip((keys, values), expected, strict=True):
        torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
    return out


def test_a_released_sampler_captures_again():
    engine = on_gpu("opt")
    sampler = GraphSampler(engine)
    expected = sampled(sampler)
    before = torch.cuda.memory_allocated()
    sampler.release()
    assert torch.cuda.memory_allocated() < before
    same(sampled(sampler), expected, 1e-5)
    assert len(sampler.captured) == 1


def test_a_cut_distribution_is_captured():
    engine = on_gpu("llama")
    sampler, cut = GraphSampler(engine), {"top_k": 40, "top_p": 0.9}
    same(sampled(sampler, **cut), sampled(EagerSampler(engine), **cut))
    assert sampler.captured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "size", "heads", "kv_heads", "window", "softcap"),
    [
        (3, 16, 4, 4, None, None), (200, 64, 4, 4, None, None), (3, 64, 8, 2, None, None), (200, 80, 12, 1, None, None),
        (3, 80, 4, 4, 100, None), (200, 128, 8, 2, 100, None), (3, 128, 8, 2, None, 5.0), (200, 64, 4, 4, 100, 5.0),
    ],
)  # fmt: skip
def test_attention_over_live_columns(dtype, rows, size, heads, kv_heads, window, softcap):
    g = torch.Generator("cuda").manual_seed(0)
    query, keys, values = (
        torch.randn(rows, count, columns, size, generator=g, device="cuda").to(dtype)
        for count, columns in ((heads, 1), (kv_heads, 320), (kv_heads, 320))
    )
    lengths = torch.randint(1, 321, (rows,), generator=g, device="cuda")
    lengths[1] = 0
    found = attended(query, keys, values, lengths, size**-0.5, window, softcap)
    expected = decode(query.double(), keys.double(), values.double(), lengths, size**-0.5, window, softcap)
    busy = lengths > 0
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found[busy].double(), expected[busy], atol=tolerance, rtol=tolerance)
    assert (found[~busy] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("summed", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "size", "heads", "kv_heads"), [(3, 16, 4, 4), (200, 64, 6, 6), (3, 64, 8, 2), (200, 64, 71, 1)]
)
def test_a_bias_by_column_is_added_and_the_sum_rounded(dtype, summed, rows, size, heads, kv_heads):
    g = torch.Generator("cuda").manual_seed(0)
    # small integers and a scale of a quarter: every score is exact, so that each rounds the same way on both sides
    query, keys = (
        torch.randint(-2, 3, (rows, count, columns, size), generator=g, device="cuda").to(dtype)
        for count, columns in ((heads, 1), (kv_heads, 320))
    )
    values = torch.randn(rows, kv_heads, 320, size, generator=g, device="cuda").to(dtype)
    lengths = torch.randint(1, 321, (rows,), generator=g, device="cuda")
    lengths[1] = 0
    slopes = 2.0 ** -torch.arange(1, heads + 1, device="cuda").clamp(max=8)
    bias = (slopes.unsqueeze(1) * torch.arange(512, device="cuda")).to(summed)[:, :320]
    found = attended(query, keys, values, lengths, 0.25, None, None, bias)
    expected = decode(query.double(), keys.double(), values.double(), lengths, 0.25, None, None, bias)
    busy = lengths > 0
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found[busy].double(), expected[busy], atol=tolerance, rtol=tolerance)
    assert (found[~busy] == 0).all()


def test_attention_reads_nothing_beyond_a_length():
    query = torch.randn(2, 4, 1, 64, device="cuda")
    keys, values = torch.randn(2, 2, 4, 256, 64, device="cuda")
    lengths = torch.tensor([5, 200], device="cuda")
    expected = attended(query, keys, values, lengths, 0.125, None, None)
    for row, length in enumerate([5, 200]):
        keys[row, :, length:] = torch.nan
        values[row, :, length:] = torch.nan
    assert torch.equal(attended(query, keys, values, lengths, 0.125, None, None), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [259, 4096, 50272])
def test_draws_are_those_of_the_torch_sampler(dtype, vocabulary):
    from rlhfdsl.engines.rollout.kernels import drawing

    logits = (3 * torch.randn(64, vocabulary, device="cuda")).to(dtype)
    seeds = row_seeds(3, 1, torch.arange(64)).cuda()
    step = torch.arange(64, device="cuda") % 7
    chosen, log_probs = drawing.draw(logits, 0.7, seeds, step)
    scaled = logits.float() / 0.7
    noisy = scaled + gumbel(seeds, step, vocabulary)
    # the logarithms may round differently: the chosen token is a maximum to 1e-4
    assert (noisy.gather(1, chosen.unsqueeze(1)).squeeze(1) >= noisy.max(1).values - 1e-4).all()
    assert (chosen == noisy.argmax(1)).float().mean() > 0.98
    expected = scaled.log_softmax(-1).gather(1, chosen.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stops", [(-1,), (3, 5, 8), tuple(range(0, 400, 2))])
def test_slots_advance_as_in_torch(stops):
    from rlhfdsl.engines.rollout.kernels import drawing

    rows, longest, stops = 64, 6, torch.tensor(stops, device="cuda")
    g = torch.Generator("cuda").manual_seed(0)
    slots = Slots.empty(80, 9, torch.device("cuda")).first(rows)
    slots.idle.copy_(torch.arange(rows, device="cuda") % 5 == 0)
    slots.write.copy_(torch.arange(rows, device="cuda"))
    slots.seed.copy_(row_seeds(3, 1, torch.arange(rows)))
    other = Slots(**{field.name: getattr(slots, field.name).clone() for field in fields(slots)})
    for _ in range(longest + 1):
        logits = torch.randn(rows, 400, generator=g, device="cuda")
        other.advance(*drawing.draw(logits, 0.7, other.seed, other.step), stops, longest)
        drawing.advance(logits, 0.7, slots, stops, longest)
        for field in fields(slots):
            assert torch.equal(getattr(slots, field.name), getattr(other, field.name)), field.name
    assert slots.idle.all() and (slots.step[slots.step > 0] <= longest).all()


def test_draws_follow_the_softmax():
    from rlhfdsl.engines.rollout.kernels import drawing

    count = 1 << 19
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 3.0, 0.5], device="cuda").expand(count, 6).contiguous()
    seeds = row_seeds(11, 0, torch.arange(count)).cuda()
    chosen, _ = drawing.draw(logits, 1.3, seeds, torch.zeros(count, dtype=torch.int64, device="cuda"))
    expected = (logits[0] / 1.3).softmax(0).double() * count
    found = torch.bincount(chosen, minlength=6).double()
    # chi-squared with 5 degrees of freedom: above 25.7 once in 10 000 for a right sampler
    assert ((found - expected).square() / expected).sum() < 25.7


def test_several_lengths_in_one_batch():
    engine = on_gpu("qwen2")
    for prompts in ([list(range(1, 1 + n)) for n in (1, 250, 64, 65, 2, 128)], PROMPTS):
        same(
            sampled(GraphSampler(engine), prompts, tokens=100, stop=()),
            sampled(EagerSampler(engine), prompts, tokens=100, stop=()), 1e-3,
        )  # fmt: skip
