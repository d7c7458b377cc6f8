"""The graph rollout against the eager one: the same tokens, ends and log-probabilities."""

import subprocess
import sys

import pytest
import torch
from rollouts import LORA, PROMPTS, TYPES, judged, learn, same, sampled, tiny
from transformers.models.mpt import modeling_mpt

from rlhfdsl.engines import passes
from rlhfdsl.engines.rollout import parity
from rlhfdsl.engines.rollout.cache import RowLayer
from rlhfdsl.engines.rollout.eager import EagerSampler
from rlhfdsl.engines.rollout.graph import GraphSampler
from rlhfdsl.engines.rollout.sampling import Distribution, draw
from rlhfdsl.models.lora import adapters_off, lora_layers
from rlhfdsl.planning.capabilities import choose, table

OWN = ["bloom", "falcon", "falcon with alibi", "falcon of groups", "gptj", "gpt_neo", "mpt"]  # attention of their own
LONG = [[(7 * i + 31 * row) % 255 for i in range(length)] for row, length in enumerate((333, 400))]


@pytest.mark.parametrize("name", TYPES)
def test_graph_equals_eager(name):
    engine = tiny(name)
    graph, eager = GraphSampler(engine), EagerSampler(engine)
    engine.train()
    first = sampled(eager)
    # the case is worth something: some answers stop early and some at different lengths
    assert first.ended.any() and len(first.answer_lengths.unique()) > 2
    same(sampled(graph), first)
    assert engine.module.training  # as it was
    # shorter, longer, more and fewer rows over the same cache; no row ends
    same(sampled(graph, PROMPTS[:2], answers=1, stop=(258,)), sampled(eager, PROMPTS[:2], answers=1, stop=(258,)))
    long = [list(range(i, i + 90 - 20 * i)) for i in range(4)]
    options = {"answers": 3, "temperature": 1.0, "tokens": 26, "stop": (258,), "seed": 6}
    same(sampled(graph, long, **options), sampled(eager, long, **options))
    # an update is seen, and a rollout from before is not
    learn(engine)
    after = sampled(eager)
    assert not torch.equal(after.log_probs, first.log_probs)
    same(sampled(graph), after)


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 40, "top_p": 0.9}])
def test_a_cut_distribution_gives_the_same_answers(cut):
    engine = tiny("llama")
    graph, eager = GraphSampler(engine), EagerSampler(engine)
    found = sampled(eager, **cut)
    assert not torch.equal(found.answer_lengths, sampled(eager).answer_lengths)  # it changes what is drawn
    same(sampled(graph, **cut), found)
    same(sampled(graph), sampled(eager))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_graph_reads_the_training_weights_under_zero(zero):
    engine = tiny("llama", zero=zero)
    graph, eager = GraphSampler(engine), EagerSampler(engine)
    for _ in range(2):
        same(sampled(graph, tokens=12), sampled(eager, tokens=12))
        learn(engine)


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2", *OWN])
@pytest.mark.parametrize("zero", [0, 3])
def test_adapters_are_read_as_they_train(name, zero):
    engine = tiny(name, zero=zero, lr=0.1, lora=LORA)
    graph, eager = GraphSampler(engine), EagerSampler(engine)
    first = sampled(eager, tokens=8)
    same(sampled(graph, tokens=8), first)
    learn(engine)
    after = sampled(eager, tokens=8)
    assert not torch.equal(after.log_probs, first.log_probs)
    same(sampled(graph, tokens=8), after)


@pytest.mark.parametrize("name", ["bloom of six heads", "falcon with alibi, one key"])
def test_alibi_of_a_long_row_is_rounded_as_the_model_rounds_it(name):
    """Beyond 256 tokens bf16 holds not every multiple of a slope."""
    engine = tiny(name)
    same(sampled(GraphSampler(engine), LONG, tokens=8), sampled(EagerSampler(engine), LONG, tokens=8))
    engine = tiny(name, "bf16", zero=1)
    found = judged(engine, GraphSampler(engine), LONG, tokens=8)
    assert found.holds, found


def test_prompts_in_parts_of_few_scores_are_the_same(monkeypatch):
    engine = tiny("bloom")
    expected = sampled(GraphSampler(engine))
    monkeypatch.setattr("rlhfdsl.engines.rollout.attention.SCORES", 2 * 4 * 16 * 16)  # two prompts of 16, four heads
    same(sampled(GraphSampler(engine)), expected, 1e-5)


def test_prompts_of_one_token(monkeypatch):
    engine = tiny("opt")
    same(sampled(GraphSampler(engine), [[7], [9]]), sampled(EagerSampler(engine), [[7], [9]]))


def test_prefill_in_parts_is_the_same(monkeypatch):
    engine = tiny("llama")
    expected = sampled(GraphSampler(engine))
    monkeypatch.setattr("rlhfdsl.engines.rollout.graph.PREFILL_TOKENS", 40)  # two prompts of 16 at a time
    same(sampled(GraphSampler(engine)), expected, 1e-5)


def test_stops_when_every_row_ended():
    engine = tiny("llama")
    sampler = GraphSampler(engine)
    steps = []
    advance = sampler._advance
    sampler._advance = lambda count: (steps.append(count), advance(count))
    everything = tuple(range(259))
    found = sampled(sampler, stop=everything, tokens=200)
    assert found.answer_lengths.tolist() == [1] * 10 and found.ended.all()
    assert len(steps) == 8  # looked at once, not 200 steps


@pytest.mark.parametrize("at_once", [1, 3, 4, 10, 64])
def test_slots_are_refilled_and_change_no_answer(at_once):
    engine = tiny("llama")
    expected = sampled(EagerSampler(engine))
    sampler = GraphSampler(engine)
    same(sampled(sampler, at_once=at_once), expected)
    assert len(sampler.slots.token) == min(at_once, 10)
    same(sampled(EagerSampler(engine), at_once=at_once), expected)
    # the slots' state from the rollout before leaves no trace
    same(sampled(sampler, at_once=at_once), expected)


def test_a_slot_that_is_free_early_does_more_answers():
    engine = tiny("llama")
    sampler = GraphSampler(engine)
    steps = []
    advance = sampler._advance
    sampler._advance = lambda count: (steps.append(count), advance(count))
    prompts = [[5 + i, 9] for i in range(24)]
    found = sampled(sampler, prompts, answers=1, tokens=96, at_once=4)
    eager = sum(int(found.answer_lengths[i : i + 4].max()) for i in range(0, 24, 4))
    assert len(steps) < eager  # four slots, each going on at once, beside six batches that wait for their longest
    same(found, sampled(EagerSampler(engine), prompts, answers=1, tokens=96, at_once=4))


def test_a_released_sampler_starts_again():
    engine = tiny("gpt2")
    sampler = GraphSampler(engine)
    expected = sampled(sampler)
    sampler.release()
    assert sampler.cache is None and not sampler.captured
    same(sampled(sampler), expected, 1e-6)


def test_the_model_has_its_own_attention_again():
    engine = tiny("llama")
    sampled(GraphSampler(engine))
    assert engine.module.config._attn_implementation == passes.CAUSAL


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_the_attention_of_its_own_is_there_again(name):
    engine = tiny(name)
    before, make_mask = sampled(EagerSampler(engine)), modeling_mpt.create_causal_mask
    sampled(GraphSampler(engine))
    assert not any("forward" in vars(module) for module in engine.module.modules())
    assert modeling_mpt.create_causal_mask is make_mask
    same(sampled(EagerSampler(engine)), before, 0)


# -- which engine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, rule in table()["types"].items() if rule["engine"] == "graph"])
def test_capable_types_get_the_graph_on_cuda_when_it_was_tested(name):
    assert name in {arch.get("model_type", key) for key, arch in TYPES.items()}
    for zero in (0, 1, 2):
        assert choose(name, zero, "cuda") == ("graph", table()["reasons"]["in_place"])
    engine, reason = choose(name, 3, "cuda")
    assert engine == "graph" and "gathered" in reason
    assert choose(name, 0, "cpu")[0] == "eager" and choose(name, 0, "cpu", "graph")[0] == "graph"
    assert choose(name, 0, "cuda", "eager")[0] == "eager"


def test_other_types_get_eager_and_the_reason():
    for asked in ("auto", "graph"):
        engine, reason = choose("new", 0, "cuda", asked)
        assert engine == "eager" and "not been proved" in reason


def test_the_table_is_read_without_torch():
    code = "import sys; from rlhfdsl.planning.capabilities import choose; choose('opt', 0, 'cuda'); "
    code += "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- the parity gate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["opt", "llama", "gpt2"])
def test_gate_holds_on_a_right_rollout(name, dtype):
    engine = tiny(name, dtype, zero=0 if dtype == "fp32" else 1)
    found = judged(engine, GraphSampler(engine))
    assert found.holds, found
    assert judged(engine, EagerSampler(engine)).rollout_mean == pytest.approx(found.eager_mean, rel=0.5, abs=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["opt", "llama", "gpt2", "bloom"])
def test_gate_catches_a_wrong_cache_position(name, dtype, monkeypatch):
    right = RowLayer.decode
    monkeypatch.setattr(
        RowLayer, "decode", lambda layer, write: right(layer, (write - 1).clamp(min=0))
    )  # each token overwrites the one before it
    engine = tiny(name, dtype, zero=0 if dtype == "fp32" else 1)
    found = judged(engine, GraphSampler(engine))
    assert not found.holds, found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gate_catches_a_stale_copy_of_the_weights(dtype):
    engine, stale = (tiny("llama", dtype, zero=0 if dtype == "fp32" else 1) for _ in range(2))
    assert judged(engine, GraphSampler(stale)).holds
    learn(engine)
    found = judged(engine, GraphSampler(stale))
    assert not found.holds, found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [1, 3])
def test_gate_catches_adapters_that_are_left_out(dtype, zero, monkeypatch):
    engine = tiny("llama", dtype, zero, lr=0.1, lora=LORA)
    sampler = GraphSampler(engine)
    assert judged(engine, sampler).holds
    learn(engine)
    forward = sampler._forward

    def without(*given):
        with adapters_off(lora_layers(sampler.model)):
            return forward(*given)

    monkeypatch.setattr(sampler, "_forward", without)
    found = judged(engine, sampler)
    assert not found.holds, found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gate_catches_a_copy_that_is_not_made_anew(dtype, monkeypatch):
    engine = tiny("llama", dtype, zero=3)
    sampler = GraphSampler(engine)
    assert judged(engine, sampler).holds
    learn(engine)
    monkeypatch.setattr(sampler.copied, "refresh", lambda: None)
    found = judged(engine, sampler)
    assert not found.holds, found


def greedy(logits, distribution, seeds, step):
    chosen = logits.argmax(-1)
    log_probs = (logits.float() / distribution.temperature).log_softmax(-1)
    return chosen, log_probs.gather(1, chosen.unsqueeze(1)).squeeze(1)


def of_another_step(logits, distribution, seeds, step):
    return draw(logits, distribution, seeds, step + 1)


def of_one_seed(logits, distribution, seeds, step):
    return draw(logits, distribution, seeds[:1].expand_as(seeds), step)


def without_a_cut(logits, distribution, seeds, step):
    return draw(logits, Distribution(distribution.temperature), seeds, step)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("wrong", [greedy, of_another_step, of_one_seed])
def test_gate_catches_tokens_that_are_drawn_otherwise_than_is_said(wrong, dtype, monkeypatch):
    """Their log-probabilities are right: only the noise tells."""
    monkeypatch.setattr("rlhfdsl.engines.rollout.graph.draw", wrong)
    engine = tiny("llama", dtype, zero=0 if dtype == "fp32" else 1)
    found = judged(engine, GraphSampler(engine))
    assert not found.holds and found.behind_mean > 0.2, found
    near = parity.MEAN_RATIO * found.eager_mean + parity.FLOOR[dtype]
    assert found.rollout_mean <= near


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gate_knows_a_cut(dtype, monkeypatch):
    engine = tiny("llama", dtype, zero=0 if dtype == "fp32" else 1)
    cut = {"top_k": 30, "top_p": 0.7}
    found = judged(engine, GraphSampler(engine), **cut)
    assert found.holds, found
    monkeypatch.setattr("rlhfdsl.engines.rollout.graph.draw", without_a_cut)
    found = judged(engine, GraphSampler(engine), **cut)
    assert not found.holds and found.behind_mean > 0.2, found


def test_gate_does_not_hold_on_nan():
    ones = torch.ones(2, 3)
    none = torch.zeros(2, 3)
    assert parity.compare(ones, ones, ones, none, ones, "fp32").holds
    assert not parity.compare(ones * torch.nan, ones, ones, none, ones, "fp32").holds
    assert not parity.compare(ones, ones, ones, ones * torch.nan, ones, "fp32").holds


def test_eager_reads_given_tokens_as_it_sampled_them():
    engine = tiny("llama")
    rollout = sampled(EagerSampler(engine))
    log_probs, behind = EagerSampler(engine).read(rollout, Distribution(0.7))
    torch.testing.assert_close(log_probs, rollout.log_probs, atol=1e-5, rtol=0)
    assert behind.max() < 1e-5
