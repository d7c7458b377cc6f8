"""Passes over real tokens alone against passes over padded rows: what they say, and their gradients."""

import pytest
import torch
from rollouts import LORA, TYPES, tiny, tiny_model
from small import engine, scratch, spec

from rlhfdsl.engines import passes
from rlhfdsl.engines.base import BasePolicy, BesideBase
from rlhfdsl.engines.engine import PolicyEngine, ScalarEngine
from rlhfdsl.models.inputs import forward_inputs, length_mask, packed_inputs
from rlhfdsl.models.packing import Packing
from rlhfdsl.planning.cut import PassCost
from rlhfdsl.training.losses import token_mean
from rlhfdsl.training.reading import Targets, target_statistics

LENGTHS = torch.tensor([19, 3, 11, 1])
TOTAL = 34
IDS = torch.randint(0, 250, (4, 19), generator=torch.Generator().manual_seed(0))
REAL = length_mask(LENGTHS, 19)
READY = PassCost(0.0, True)  # however few the tokens are
PADDED_TYPES = {"gemma2", "bloom", "falcon", "gptj", "gpt_neo", "mpt"}  # which attend otherwise than by their interface


def test_real_tokens_come_one_after_the_other_and_go_back():
    packing = Packing.of(torch.tensor([2, 3, 1]), 3, 6)
    rows = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 5.0], [6.0, 9.0, 9.0]], requires_grad=True)
    packed = packing.gathered(rows)
    assert packed.tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    assert packing.positions.tolist() == [[0, 1, 0, 1, 2, 0]]
    back = packing.spread(packed)
    assert back.tolist() == [[1.0, 2.0, 0.0], [3.0, 4.0, 5.0], [6.0, 0.0, 0.0]]
    assert packing.indices(torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])).tolist() == [4, 5, 1]
    (back * torch.arange(9.0).view(3, 3)).sum().backward()
    assert rows.grad.tolist() == [[0.0, 1.0, 0.0], [3.0, 4.0, 5.0], [6.0, 0.0, 0.0]]  # of padding none


@pytest.mark.parametrize("name", TYPES)
def test_logits_and_gradients_are_those_of_padded_rows(name):
    found = []
    for packed in (False, True):
        model = tiny_model(name).eval()
        rows = passes.without_masks(model)
        if model.config.model_type in PADDED_TYPES:
            assert rows is None
            return
        if packed:
            rows.packing = Packing.of(LENGTHS, 19, TOTAL)
            logits = model(**packed_inputs(IDS, rows.packing)).logits[0]
        else:
            logits = model(**forward_inputs(model, IDS, LENGTHS)).logits[REAL]
        logits.log_softmax(-1).square().sum().backward()
        found.append((logits.detach(), *(p.grad for p in model.parameters())))
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def losses(actor: PolicyEngine, total: int | None) -> torch.Tensor:
    """Log-probabilities of the tokens from the third on, [4, 19], after one backward of their mean."""
    marked = REAL & (torch.arange(19) >= 2)
    actor.train()
    log_probs, _ = target_statistics(actor, IDS, LENGTHS, Targets.of(marked), 0.7, total)
    actor.backward(token_mean(-log_probs, marked, marked.sum(), 1))
    return log_probs.detach()


@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_is_that_of_padded_rows(tmp_path, zero, checkpointing):
    source, ends = scratch(tmp_path / "small"), []
    for total in (None, TOTAL):
        actor = engine(PolicyEngine, source, spec(zero=zero, checkpointing=checkpointing, lr=1e-2))
        assert actor.cost.packs
        actor.cost = READY
        read = []
        handle = actor.module.model.embed_tokens.register_forward_hook(lambda _, __, out, read=read: read.append(out))
        first = losses(actor, total)
        handle.remove()
        assert read[0].shape[:2] == ((4, 19) if total is None else (1, TOTAL))
        actor.step()
        ends.append((first, losses(actor, total)))
    for padded, packed in zip(*ends, strict=True):
        torch.testing.assert_close(packed, padded, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(ends[0][0], ends[0][1], atol=1e-3)  # the update moved something


@pytest.mark.parametrize("zero", [0, 3])
def test_scalars_are_those_of_padded_rows(tmp_path, zero):
    source, ends = scratch(tmp_path / "small"), []
    for total in (None, TOTAL):
        critic = engine(ScalarEngine, source, spec("critic", zero=zero, lr=1e-2))
        critic.cost = READY
        for _ in range(2):
            critic.train()
            values = critic.scalars(IDS, LENGTHS, total)
            critic.backward((values * REAL).square().mean())
            critic.step()
        ends.append(torch.cat([values.detach()[REAL], critic.scores(IDS, LENGTHS, total).detach()]))
    torch.testing.assert_close(ends[1], ends[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("zero", [0, 3])
def test_a_base_is_read_packed_as_padded(zero):
    actor = tiny("llama", zero=zero, lr=0.1, lora=LORA)
    actor.cost = READY
    losses(actor, TOTAL)
    actor.step()
    actor.eval()
    base = BasePolicy(actor.spec, actor)
    targets = Targets.of(REAL)
    with torch.no_grad():
        padded, packed = (target_statistics(base, IDS, LENGTHS, targets, total=total)[0] for total in (None, TOTAL))
        policy, _ = target_statistics(actor, IDS, LENGTHS, targets, total=TOTAL)
        both, _ = target_statistics(
            BesideBase(base), IDS.repeat(2, 1), LENGTHS.repeat(2), Targets.of(REAL.repeat(2, 1)), total=2 * TOTAL
        )
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both, torch.cat([policy, packed]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(policy, packed, atol=1e-3)


def test_rows_of_one_length_and_rows_of_no_target_are_read_as_they_are(tmp_path):
    actor = engine(PolicyEngine, scratch(tmp_path / "small"), spec())
    actor.cost = READY
    full = torch.full((4,), 19)
    assert actor.packing(full, 19, 76) is None and actor.packing(LENGTHS, 19, None) is None
    assert actor.packing(LENGTHS, 19, TOTAL) is not None
    nothing = Targets.of(torch.zeros(4, 19, dtype=torch.bool))
    log_probs, _ = target_statistics(actor, IDS, LENGTHS, nothing, total=TOTAL)
    assert not log_probs.any() and actor.rows.packing is None


def test_a_model_in_which_rows_meet_outside_attention_is_read_with_its_padding(tmp_path, caplog):
    """A layer that looks at the token before, as a convolution does, would see another row's last one."""

    class Looks(PolicyEngine):
        def _packs_right(self) -> bool:
            embedding = self.module.model.embed_tokens
            embedding.register_forward_hook(lambda _, __, out: out + out.roll(1, 1))
            return super()._packs_right()

    actor = engine(Looks, scratch(tmp_path / "small"), spec())
    assert not actor.cost.packs and "read with their padding" in caplog.text
    assert actor.packing(LENGTHS, 19, TOTAL) is None


def test_a_model_that_cannot_read_one_row_of_all_is_read_with_its_padding(tmp_path, caplog):
    class Refuses(PolicyEngine):
        def _packs_right(self) -> bool:
            def of_three(_, given):
                if len(given[0]) != 3:
                    raise ValueError("three rows, please")

            self.module.model.embed_tokens.register_forward_pre_hook(of_three)
            return super()._packs_right()

    actor = engine(Refuses, scratch(tmp_path / "small"), spec())
    assert not actor.cost.packs and "since three rows, please" in caplog.text
    assert actor.rows.packing is None


def test_a_recipe_can_say_no(tmp_path):
    actor = engine(PolicyEngine, scratch(tmp_path / "small"), spec() | {"packing": False})
    assert not actor.cost.packs and actor.packing(LENGTHS, 19, TOTAL) is None
