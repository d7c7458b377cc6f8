"""Rows without padding on a CUDA device, whose attention kernels take bf16 and rows of any lengths; and the scalar head
in fp32. One command: `make test-gpu`."""

import pytest
import torch
from rollouts import TYPES, tiny_model
from small import engine, one_rank, scratch, spec
from test_packing import IDS, LENGTHS, PADDED_TYPES, READY, REAL, TOTAL

from rlhfdsl.engines import passes
from rlhfdsl.engines.engine import PolicyEngine, ScalarEngine
from rlhfdsl.models.inputs import forward_inputs, packed_inputs
from rlhfdsl.models.packing import Packing
from rlhfdsl.training.losses import token_mean
from rlhfdsl.training.reading import Targets, target_statistics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
PACKED_TYPES = [name for name in TYPES if TYPES[name].get("model_type", name).split()[0] not in PADDED_TYPES]


@pytest.fixture(autouse=True)
def exact_fp32():
    torch.backends.cuda.matmul.allow_tf32 = False


def read(name: str, dtype: torch.dtype, packed: bool) -> list[torch.Tensor]:
    """Logits of the real tokens and the gradients of a loss of them."""
    model = tiny_model(name).eval().to("cuda", dtype)
    rows = passes.without_masks(model)
    ids, lengths = IDS.cuda(), LENGTHS.cuda()
    if packed:
        rows.packing = Packing.of(lengths, 19, TOTAL)
        logits = model(**packed_inputs(ids, rows.packing)).logits[0].float()
    else:
        logits = model(**forward_inputs(model, ids, lengths)).logits[REAL.cuda()].float()
    logits.log_softmax(-1).square().mean().backward()
    return [logits.detach(), *(p.grad.float() for p in model.parameters())]


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Of all tensors together, relative."""
    squares = [((a - b).square().sum(), b.square().sum()) for a, b in zip(found, expected, strict=True)]
    return float(sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5


@pytest.mark.parametrize("name", PACKED_TYPES)
def test_logits_and_gradients_are_those_of_padded_rows(name):
    exact = read(name, torch.float32, False)
    assert distance(read(name, torch.float32, True), exact) < 1e-4
    padded, packed = (distance(read(name, torch.bfloat16, how), exact) for how in (False, True))
    assert packed < 1.5 * padded < 0.2


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_updates_in_bf16_are_those_of_padded_rows(tmp_path, zero, checkpointing):
    one_rank()
    source, ends = scratch(tmp_path / "small"), []
    marked = (REAL & (torch.arange(19) >= 2)).cuda()
    for total in (None, TOTAL):
        actor = engine(
            PolicyEngine, source, spec(zero=zero, checkpointing=checkpointing, dtype="bf16", lr=1e-2, device="cuda")
        )
        assert actor.cost.packs
        actor.cost = READY
        for _ in range(3):
            actor.train()
            log_probs, _ = target_statistics(actor, IDS.cuda(), LENGTHS.cuda(), Targets.of(marked), 0.7, total)
            actor.backward(token_mean(-log_probs, marked, marked.sum(), 1))
            actor.step()
        ends.append(log_probs.detach()[marked])
    first = -torch.log(torch.tensor(259.0))
    assert (ends[0] - first.item()).mean() > 0.5  # it has learned
    torch.testing.assert_close(ends[1].mean(), ends[0].mean(), atol=0.03, rtol=0)
    torch.testing.assert_close(ends[1], ends[0], atol=0.3, rtol=0)


def test_the_scalar_head_of_a_bf16_model_multiplies_in_fp32(tmp_path):
    one_rank()
    critic = engine(
        ScalarEngine, scratch(tmp_path / "small"), spec("critic", dtype="bf16", trains=False, device="cuda")
    )
    head = next(m for m in critic.module.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1)
    seen = []
    handle = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        values = critic.scalars(IDS.cuda(), LENGTHS.cuda())
    handle.remove()
    exact = seen[0].double() @ head.weight.double()[0]
    assert values.dtype == torch.float32 and seen[0].dtype == torch.bfloat16
    torch.testing.assert_close(values[REAL.cuda()].double(), exact[REAL.cuda()], atol=1e-5, rtol=1e-5)
