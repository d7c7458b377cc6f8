"""Parameter counts against models that transformers builds on the meta device, and published counts."""

import pytest
from shapes import config_of, tiny

from rlhfdsl.planning import catalog
from rlhfdsl.planning.catalog import largest_layer, lookup, parameters, shape
from rlhfdsl.planning.families import FAMILIES, GATED

# As the model cards or the checkpoints' safetensors headers count them.
PUBLISHED = {
    "facebook/opt-125m": 125_239_296,
    "facebook/opt-350m": 331_196_416,
    "facebook/opt-1.3b": 1_315_758_080,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b-it": 9_241_705_984,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-it": 999_885_952,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "EleutherAI/pythia-70m": 70_426_624,
    "EleutherAI/pythia-1.4b-deduped": 1_414_647_808,
    "EleutherAI/pythia-12b": 11_846_072_320,
    "EleutherAI/gpt-neox-20b": 20_554_567_680,
    "bigscience/bloom-560m": 559_214_592,
    "bigscience/bloom-7b1": 7_069_016_064,
    "bigscience/bloom": 176_247_271_424,
}
SHAPES = {hub: lookup(hub) for hub in catalog.names()}
SMALLEST = {
    kind: min(
        (hub for hub, numbers in SHAPES.items() if numbers["type"] == kind),
        key=lambda hub: SHAPES[hub]["layers"] * SHAPES[hub]["hidden"],
    )
    for kind in FAMILIES
}


@pytest.mark.parametrize(("hub", "count"), PUBLISHED.items())
def test_published(hub, count):
    assert parameters(shape(lookup(hub))) == count


def test_every_entry_is_whole():
    for hub, numbers in SHAPES.items():
        entry = shape(numbers)
        assert entry is not None and parameters(entry) is not None, hub
        assert entry.heads % entry.kv_heads == 0, hub
        assert numbers.get("head_dim") or entry.hidden % entry.heads == 0, hub


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_formulas_equal_transformers(kind, tied):
    """A small model of every family, as causal model and with a scalar head."""
    numbers = tiny(kind) | {"tied": tied, "kv_heads": 2 if kind in GATED else 4}
    same_as_transformers(numbers)


@pytest.mark.parametrize("hub", [*SMALLEST.values(), "facebook/opt-350m"])
def test_real_shapes_equal_transformers(hub):
    same_as_transformers(lookup(hub))


@pytest.mark.slow
@pytest.mark.parametrize("hub", SHAPES)
def test_the_whole_catalog_equals_transformers(hub):
    same_as_transformers(lookup(hub))


def same_as_transformers(numbers):
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config, entry = config_of(numbers), shape(numbers)
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config)
        scalar = AutoModelForSequenceClassification.from_config(config)
    assert parameters(entry) == count(causal)
    assert parameters(entry, "scalar") == count(scalar)
    own = (sum(p.numel() for p in module.parameters(recurse=False)) for module in causal.modules())
    if numbers["vocab"] > 1000:
        assert largest_layer(entry) == max(own)


def test_unknown_numbers():
    assert lookup("nobody/nothing") is None
    assert shape({"type": "llama", "layers": 2}) is None
    assert parameters(shape({**lookup("gpt2"), "type": "mamba"})) is None


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())
