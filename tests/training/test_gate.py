"""The parity gate of a stage: a right rollout engine passes, a wrong one is replaced or ends the stage."""

import pytest
from small import spec
from test_ppo import prompts, settings, trainer

from rlhfdsl.engines.rollout.cache import RowLayer
from rlhfdsl.engines.rollout.eager import EagerSampler
from rlhfdsl.engines.rollout.graph import GraphSampler
from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.training.evaluation import answer
from rlhfdsl.training.gate import pass_gate
from rlhfdsl.training.onpolicy import OnPolicy


def with_graph(source, **changes):
    one = trainer(source, source, settings(rollout=changes))
    one.engines.actor.sampler = GraphSampler(one.engines.actor)
    return one


@pytest.fixture
def wrong_position(monkeypatch):
    """Each token overwrites the one before it."""
    right = RowLayer.decode
    monkeypatch.setattr(RowLayer, "decode", lambda layer, write: right(layer, (write - 1).clamp(min=0)))


def test_a_right_engine_passes(source):
    one = with_graph(source)
    found = pass_gate(one, prompts())
    assert found["engine"] == "graph" and "refused" not in found and found["rollout_mean"] < 1e-5
    assert found["behind_mean"] < 1e-5
    assert one.engines.actor.sampler.name == "graph"
    one.generate_experience(prompts(), [0, 1, 2, 3])


@pytest.mark.parametrize("free", [True, False])
def test_what_reads_answers_finds_the_memory_of_their_sampling_given_back(source, free, monkeypatch):
    one = with_graph(source)
    one.engines.actor.spec["rollout"]["free_cache"] = free
    sampler, held = one.engines.actor.sampler, []
    for place, name in ((EagerSampler, "read"), (OnPolicy, "score")):
        read = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *given, read=read: (held.append(sampler.cache), read(*given))[1])
    pass_gate(one, prompts())
    answer(one, prompts())
    one.generate_experience(prompts(), [0, 1, 2, 3])
    assert len(held) >= 3 and all((cache is None) == free for cache in held)


def test_eager_has_nothing_to_pass(source):
    found = pass_gate(trainer(source, source), prompts())
    assert found == {"engine": "eager", "reason": spec()["rollout"]["reason"]}


def test_a_wrong_engine_is_replaced(source, wrong_position):
    one = with_graph(source)
    found = pass_gate(one, prompts())
    assert found["engine"] == "eager" and found["refused"] == "graph" and found["rollout_mean"] > 1e-3
    assert one.engines.actor.sampler.name == "eager" and "does not sample" in one.engines.actor.rollout_reason


def test_or_ends_the_stage(source, wrong_position):
    with pytest.raises(UserError, match="does not sample from the policy") as raised:
        pass_gate(with_graph(source, on_mismatch="stop"), prompts())
    assert raised.value.code == "E0783"


def test_an_engine_that_cannot_be_built_is_replaced(source, monkeypatch):
    def fail(*_):
        raise RuntimeError("no C compiler\nand a long trace")

    monkeypatch.setattr(GraphSampler, "_step", fail)
    one = with_graph(source)
    found = pass_gate(one, prompts())
    assert found == {"engine": "eager", "refused": "graph", "reason": "`graph` cannot sample here: no C compiler"}
    one.generate_experience(prompts(), [0, 1, 2, 3])
