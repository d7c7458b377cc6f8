"""FLOPs of the work of a phase against those that torch counts while it is done."""

import pytest
import torch
from small import ARCH, engine, spec
from torch.utils.flop_counter import FlopCounterMode

from rlhfdsl.engines.engine import PolicyEngine, ScalarEngine
from rlhfdsl.engines.hybrid import HybridEngine
from rlhfdsl.engines.rollout.interface import Prompts, Sampling
from rlhfdsl.planning.catalog import shape
from rlhfdsl.planning.flops import UNKNOWN, forward
from rlhfdsl.training import effort

ROWS, LENGTH = 3, 11
LORA = {"rank": 1, "alpha": 1, "targets": ["q_proj"], "dropout": 0.0, "lr": None, "base": "full"}


def loaded(kind, source, **changes):
    one = engine(kind, source, spec("critic" if kind is ScalarEngine else "policy", **changes) | {"attention": "eager"})
    count = sum(p.numel() for p in one.module.parameters())
    one.flops = forward(shape(ARCH), count, causal=kind is not ScalarEngine)
    return one


def counted(one, work, tokens):
    """What torch counts, with 2 for each token and each parameter of the norms, which the plan counts as matrices."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() + 2 * tokens * sum(p.numel() for p in one.module.parameters() if p.dim() == 1)


def ids():
    return torch.randint(0, 255, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


LENGTHS = torch.full((ROWS,), LENGTH)


@pytest.mark.parametrize("first", [0, 4])
def test_a_forward_pass(source, first):
    one = loaded(PolicyEngine, source)
    with torch.no_grad():
        found = counted(one, lambda: one.logits(ids(), LENGTHS, first), ROWS * LENGTH)
    assert effort.reading(one, LENGTHS.double(), LENGTHS.double() - first).item() == found


def test_a_value_model_has_one_row_for_an_output_matrix(source):
    one = loaded(ScalarEngine, source)
    with torch.no_grad():
        found = counted(one, lambda: one.scalars(ids(), LENGTHS), ROWS * LENGTH)
    # The row is a product to torch, and a parameter like others to the plan.
    assert effort.reading(one, LENGTHS.double()).item() == pytest.approx(found, rel=2e-3)


def test_forward_and_backward(source):
    one = loaded(PolicyEngine, source)
    found = counted(one, lambda: one.backward(one.logits(ids(), LENGTHS).float().mean()), 3 * ROWS * LENGTH)
    assert effort.learning(one, LENGTHS.double()).item() == found


def test_frozen_weights_need_no_gradient(source):
    one = loaded(PolicyEngine, source, lora=LORA)
    found = counted(one, lambda: one.backward(one.logits(ids(), LENGTHS).float().mean()), 2 * ROWS * LENGTH)
    # Adapters have gradients of their own, and nothing is needed of the layers below the first of them.
    assert effort.learning(one, LENGTHS.double()).item() == pytest.approx(found, rel=0.05)


def test_sampling_with_a_cache(source):
    one = loaded(HybridEngine, source)
    answer = 6
    prompts = Prompts(prompt_ids=ids(), prompt_attention_mask=torch.ones(ROWS, LENGTH), seeds=torch.arange(ROWS))
    sampling = Sampling(max_new_tokens=answer, temperature=1.0, n_samples_per_prompt=1, stop_ids=(), pad_id=258)
    with torch.no_grad():
        found = counted(one, lambda: one.generate(prompts, sampling), ROWS * (LENGTH + answer - 1))
    assert effort.sampling(one, LENGTHS.double(), LENGTHS.double() + answer).item() == found


def test_the_rate_of_a_device(source):
    device = torch.device("cpu")
    assert effort.rate("train", torch.tensor(6e12, dtype=torch.float64), 2.0, device) == {"tflop_per_second_train": 3.0}
    one = engine(PolicyEngine, source, spec())
    assert one.flops is UNKNOWN  # it is of no plan
    assert effort.rate("train", effort.learning(one, LENGTHS.double()), 2.0, device) == {}
