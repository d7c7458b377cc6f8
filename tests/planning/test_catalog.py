"""Parameter counts against models that transformers builds on the meta device, and published counts."""

import pytest

from rlhfdsl.planning import catalog
from rlhfdsl.planning.catalog import largest_layer, lookup, parameters, shape

# As the model cards or the checkpoints' safetensors headers count them.
PUBLISHED = {
    "facebook/opt-125m": 125_239_296,
    "facebook/opt-350m": 331_196_416,
    "facebook/opt-1.3b": 1_315_758_080,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "EleutherAI/pythia-70m": 70_426_624,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "EleutherAI/pythia-12b": 11_846_072_320,
}


@pytest.mark.parametrize(("hub", "count"), PUBLISHED.items())
def test_published(hub, count):
    assert parameters(shape(lookup(hub))) == count


def test_every_entry_is_whole():
    for hub in catalog.names():
        entry = shape(lookup(hub))
        assert entry is not None and parameters(entry) is not None, hub
        assert entry.hidden % entry.heads == 0 and entry.heads % entry.kv_heads == 0, hub


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", sorted(catalog.SUPPORTED))
def test_formulas_equal_transformers(kind, tied):
    """A small model of every family, as causal model and with a scalar head."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from rlhfdsl.models.scratch import scratch_config

    grouped = kind in catalog.GATED
    numbers = {
        "type": kind, "layers": 3, "hidden": 48, "heads": 4, "kv_heads": 2 if grouped else 4,
        "intermediate": 80, "vocab": 101, "context": 33, "tied": tied,
    }  # fmt: skip
    config = scratch_config(numbers, pad_id=0, bos_id=1, eos_id=2)
    config.num_labels = 1
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config)
        scalar = AutoModelForSequenceClassification.from_config(config)
    assert parameters(shape(numbers)) == count(causal)
    assert parameters(shape(numbers), "scalar") == count(scalar)


@pytest.mark.parametrize("hub", ["facebook/opt-350m", "facebook/opt-125m"])
def test_opt_with_and_without_a_projection(hub):
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, OPTConfig

    entry = shape(lookup(hub))
    config = OPTConfig(
        num_hidden_layers=entry.layers, hidden_size=entry.hidden, num_attention_heads=entry.heads,
        ffn_dim=entry.intermediate, vocab_size=entry.vocab, max_position_embeddings=entry.context,
        word_embed_proj_dim=entry.embed, do_layer_norm_before=entry.final_norm, num_labels=1,
    )  # fmt: skip
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config)
        scalar = AutoModelForSequenceClassification.from_config(config)
    assert parameters(entry) == count(causal)
    assert parameters(entry, "scalar") == count(scalar)
    own = (sum(p.numel() for p in module.parameters(recurse=False)) for module in causal.modules())
    assert largest_layer(entry) == max(own)


def test_unknown_numbers():
    assert lookup("nobody/nothing") is None
    assert shape({"type": "llama", "layers": 2}) is None
    assert parameters(shape({**lookup("gpt2"), "type": "bloom"})) is None


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())
