"""Model states against DeepSpeed's estimators; activations and cache against numbers worked by hand."""

import itertools

import pytest
from shapes import model_of, plain_linear, tiny

from rlhfdsl.planning.adapters import Lora, linears
from rlhfdsl.planning.catalog import shape
from rlhfdsl.planning.families import FAMILIES
from rlhfdsl.planning.memory import activations, buckets, gathered, generation, kv_cache, layer_tokens, states

GRID = list(itertools.product((125_239_296, 1_315_758_080, 66_000_000_001), (1, 3, 8), (1, 2)))
LARGEST = 102_957_056  # OPT-1.3B's embedding


def ours(count, gpus, nodes, zero, offload):
    got = states(
        count, LARGEST, dtype="bf16", zero=zero, offload=offload, trains=True, gpus=gpus, nodes=nodes
    )
    return got.host, got.total


@pytest.mark.parametrize(("count", "gpus", "nodes"), GRID)
def test_zero2_equals_deepspeed_but_for_gradients(count, gpus, nodes):
    """16-bit ones are there for a bucket only, and their fp32 sums on the device also beside an offloaded optimizer."""
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as theirs

    world = gpus * nodes
    whole = theirs(count, gpus, nodes, cpu_offload=False)[1]
    assert ours(count, gpus, nodes, 2, "off")[1] == pytest.approx(whole - 2 * count / world, abs=4)
    host, device = theirs(count, gpus, nodes, cpu_offload=True)
    assert ours(count, gpus, nodes, 2, "optimizer") == (host, device + 4 * count // world)


@pytest.mark.parametrize(("count", "gpus", "nodes"), GRID)
def test_zero3_equals_deepspeed(count, gpus, nodes):
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as theirs

    def estimate(optimizer, params):
        return theirs(count, LARGEST, gpus, nodes, cpu_offload=optimizer, cpu_offload_params=params)[:2]

    assert ours(count, gpus, nodes, 3, "off")[1] == estimate(False, False)[1]
    assert ours(count, gpus, nodes, 3, "optimizer") == estimate(True, False)
    assert ours(count, gpus, nodes, 3, "both") == estimate(True, True)


def test_what_the_estimators_leave_out():
    """Bytes for each parameter, by hand: fp32 AdamW is 4 weights + 4 gradients + 8 moments."""

    def each(**changed):
        given = {
            "dtype": "bf16",
            "zero": 1,
            "offload": "off",
            "trains": True,
            "gpus": 4,
            "nodes": 1,
        } | changed
        return states(1_000_000, 0, **given).total / 1_000_000

    assert each(dtype="fp32", zero=0) == 16
    assert each(dtype="fp32", zero=2) == 4 + (4 + 12) / 4
    assert each(zero=1) == 2 + 4 + 12 / 4  # every rank keeps all sums of gradients, in fp32
    assert each(zero=1, offload="optimizer") == 2 + 4 + 4 / 4
    assert each(dtype="fp32", zero=1, offload="optimizer") == 4 + 4
    assert each(trains=False, zero=0) == 2
    assert each(trains=False, zero=3) == 2 / 4
    assert each(trains=False, zero=3, offload="params") == 0


def test_weights_that_rest():
    """On the device while in use only, and once for each device of a node on its host."""
    found = states(1_000_000, 0, dtype="bf16", zero=0, offload="idle", trains=False, gpus=4, nodes=2)
    assert (found.total, found.lasting, found.passing, found.host) == (2_000_000, 0, 2_000_000, 8_000_000)


SMALL = shape(
    {
        "type": "llama", "layers": 3, "hidden": 8, "heads": 2, "kv_heads": 1, "intermediate": 20, "vocab": 50,
        "context": 64, "tied": True,
    }
)  # fmt: skip


def test_activations():
    common = {"sequences": 2, "length": 5, "dtype": "bf16", "head": "scalar", "eager": False, "device": "cuda"}
    # 2 e (q + kv) + 4 e h + 4 e i for each token and layer; norms are one kernel
    layer = 2 * 2 * (8 + 4) + 4 * 2 * 8 + 4 * 2 * 20
    assert activations(SMALL, **common, trains=True, checkpointing=False) == 10 * 3 * layer
    assert activations(SMALL, **common, trains=True, checkpointing=True) == 10 * (3 * 16 + layer)
    assert activations(SMALL, **common, trains=False, checkpointing=False) == 10 * layer
    eager = activations(SMALL, **{**common, "eager": True}, trains=False, checkpointing=False)
    # keys and values as wide as queries; heads x length scores, bf16 and fp32
    assert eager == 10 * (layer + 2 * 2 * (8 - 4) + 2 * 5 * 6)
    causal = activations(SMALL, **{**common, "head": "none"}, trains=True, checkpointing=True)
    assert causal == 10 * (3 * 16 + layer + 50 * 4)  # logits and their gradient in bf16
    chunked = activations(SMALL, **{**common, "head": "none", "device": "cpu"}, trains=True, checkpointing=True)
    # three fp32 copies for the loss; norms in fp32
    assert chunked == causal + 3 * 10 * 50 * 4 + 10 * 8 * 8


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_layer_keeps_what_autograd_saves(kind, dtype):
    """The storages that autograd saves in the third layer of a model, counted, within 5 %."""
    numbers = tiny(kind) | {"hidden": 256, "context": 128, "kv_heads": 2 if FAMILIES[kind].gated else 4}
    numbers |= {"intermediate": 1024} | ({"head_dim": 96} if "head_dim" in numbers else {})
    eager = not FAMILIES[kind].sdpa
    counted = saved(numbers | {"layers": 4}, dtype, eager) - saved(numbers | {"layers": 3}, dtype, eager)
    assert layer_tokens(shape(numbers), 64, dtype, eager, "cpu") == pytest.approx(counted, rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", sorted(kind for kind, family in FAMILIES.items() if family.gated and family.sdpa))
def test_on_a_gpu_a_norm_keeps_its_input_alone(kind, adapted):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    numbers = tiny(kind) | {"hidden": 256, "context": 128, "kv_heads": 2, "intermediate": 1024}
    numbers |= {"head_dim": 96} if "head_dim" in numbers else {}
    layers = linears(shape(numbers))
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": [x.path for x in layers], "lr": None} if adapted else None
    three, four = (saved(numbers | {"layers": n}, "bf16", False, lora=lora, device="cuda") for n in (3, 4))
    known = None if lora is None else Lora(lora, layers, None)
    assert layer_tokens(shape(numbers), 64, "bf16", False, "cuda", known) == pytest.approx(four - three, rel=0.05)


def saved(numbers, dtype, eager, rows=2, length=64, lora=None, device="cpu"):
    """Bytes that autograd saves for each token of a forward pass, parameters and buffers apart; lora: with adapters."""
    import torch

    from rlhfdsl.engines.norms import in_one_kernel
    from rlhfdsl.engines.passes import without_masks

    model = model_of(numbers, dtype, eager, lora).to(device)
    without_masks(model)
    if device == "cuda":
        in_one_kernel(model)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    mask = torch.ones(rows, length, dtype=torch.long, device=device)
    mask[0, -8:] = 0
    columns = torch.arange(length, device=device).expand(rows, length)
    places = {} if numbers["type"] == "bloom" else {"position_ids": columns}
    with plain_linear(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.base_model(torch.ones_like(mask), attention_mask=mask, use_cache=False, **places)
    return sum(size for size, _ in kept.values()) / (rows * length)


def test_generation():
    """Keys and values of 2 rows, one of 3 layers twice; then the larger of the prompts' layer and a draw."""
    cache = 2 * 3 * 4 * 2 * 10
    given = {"prompt": 3, "length": 5, "dtype": "bf16", "eager": False, "device": "cpu"}
    grown = cache + cache // 3
    assert generation(SMALL, rows=2, graph=False, **given) == (grown, grown + 2 * 50 * 40)
    long = generation(SMALL, rows=2, graph=False, **given | {"prompt": 9, "length": 10})
    # a mask of 9 positions, and keys and values of 8 in place of 4
    assert long[1] - long[0] == 2 * 9 * (layer_tokens(SMALL, 9, "bf16", False, "cpu") + 2 * 9 + 2 * 2 * 4)
    assert kv_cache(SMALL, sequences=2, length=5, dtype="bf16") == cache


def test_generation_by_graph():
    """A cache of 64 columns from the start; then the larger of 2 x 3 tokens of a layer and the logits twice."""
    cache = 2 * 3 * 4 * 2 * 2 * 64
    found = generation(SMALL, rows=2, prompt=3, length=5, dtype="bf16", eager=False, graph=True, device="cpu")
    assert found == (cache, cache + max(6 * layer_tokens(SMALL, 3, "bf16", False, "cpu"), 2 * 2 * 50 * 2))


def test_what_stays_and_what_passes():
    """Gradients end with the step, but for the fp32 sums of bf16 at stage 1 and the shard that ZeRO 3 keeps."""
    given = {"dtype": "bf16", "offload": "off", "trains": True, "gpus": 4, "nodes": 1}
    one, two, three = (states(1_000_000, 0, zero=zero, **given) for zero in (1, 2, 3))
    assert (one.passing, one.lasting) == (0, (2 + 4) * 1_000_000 + 12 * 250_000)
    assert states(1_000_000, 300_000, zero=1, **given).passing == 600_000  # the gradients of its largest module
    assert states(1_000_000, 300_000, zero=1, trained=1_000, **given).passing == 2_000
    assert states(1_000_000, 0, zero=1, **given | {"dtype": "fp16"}).passing == 6_000_000
    assert (two.passing, two.lasting) == (4 * 250_000, two.total - 4 * 250_000)
    assert (three.passing, three.lasting) == (0, three.total)


def test_buffers_of_zero():
    """A bucket of 2e8 elements at most, two at stage 2; at stage 3 up to 1e9 parameters whole, one module counted."""
    assert [buckets(10**9, dtype="bf16", zero=zero) for zero in (0, 1, 2, 3)] == [0, 4 * 10**8, 8 * 10**8, 4 * 10**8]
    assert buckets(5 * 10**6, dtype="fp32", zero=1) == 2 * 10**7
    big = states(10**10, 10**8, dtype="bf16", zero=3, offload="both", trains=True, gpus=8, nodes=1)
    assert gathered(big, dtype="bf16", zero=3) == 2 * 10**9 - 4 * 10**8
    assert gathered(big, dtype="bf16", zero=2) == 0
