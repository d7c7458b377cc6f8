"""The byte tokenizer, templates, and what a model's files say."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.models.facts import model_facts
from rlhfdsl.models.tokenizers import (
    HUMAN_ASSISTANT,
    byte_tokenizer,
    digest,
    generation_settings,
    load_tokenizer,
    render,
    stop_ids,
)

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " Hello\n"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
]
ARCH = {
    "type": "llama", "layers": 2, "hidden": 16, "heads": 4, "kv_heads": 2, "intermediate": 24, "vocab": 300,
    "context": 64, "tied": False,
}  # fmt: skip


def entry(path=None, **changed):
    """A model of the plan, from a directory or with the byte tokenizer."""
    source = None if path is None else {"path": path}
    tokenizer = None if path else "bytes"
    return {"from": source, "arch": None, "tokenizer": tokenizer, "template": "auto", **changed}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def test_importing_the_module_imports_nothing_heavy():
    code = (
        "import sys, rlhfdsl.models.facts, rlhfdsl.data.edge, rlhfdsl.data.facts\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_bytes_give_text_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    if not any(name in text for name in ("<pad>", "<bos>", "<eos>")):
        assert ids == list(text.encode())


def test_every_byte_has_its_id(tokenizer):
    assert len(tokenizer) == 259
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)
    text = "".join(map(chr, range(0x180)))
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == list(text.encode())
    spaced = "a , b . don 't\r\n\t x"
    assert tokenizer.decode(tokenizer(spaced)["input_ids"]) == spaced


def test_bytes_are_an_ordinary_tokenizer_directory(tmp_path):
    from transformers import AutoTokenizer

    ours = load_tokenizer(entry(), tmp_path)
    ours.save_pretrained(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs("né 日 <eos>")["input_ids"] == [*"né 日 ".encode(), 258]
    assert theirs.chat_template == HUMAN_ASSISTANT
    assert digest(theirs) == digest(ours)


def test_human_assistant(tokenizer):
    tokenizer.chat_template = HUMAN_ASSISTANT
    head = "<bos>Be kind.\n\nHuman: Hello\n\nAssistant: Hi<eos>\n\nHuman: Bye"
    assert render(tokenizer, [TALK, TALK[1:2]], generation=True) == [
        head + "\n\nAssistant:",
        "<bos>\n\nHuman: Hello\n\nAssistant:",
    ]
    assert render(tokenizer, [TALK], generation=False) == [head]
    bare = byte_tokenizer()
    bare.chat_template, bare.bos_token, bare.eos_token = HUMAN_ASSISTANT, None, None
    assert render(bare, [TALK[1:3]], generation=False) == ["\n\nHuman: Hello\n\nAssistant: Hi"]


def test_a_tokenizers_own_template_goes_first(tmp_path):
    own = byte_tokenizer()
    own.chat_template = "{{ messages[0].content }}"
    own.save_pretrained(tmp_path / "own")
    assert load_tokenizer(entry("own"), tmp_path).chat_template == "{{ messages[0].content }}"
    asked = load_tokenizer(entry("own", template="human_assistant"), tmp_path)
    assert asked.chat_template == HUMAN_ASSISTANT


def test_a_tokenizer_without_pad_pads_with_eos(tmp_path):
    own = byte_tokenizer()
    own.pad_token = None
    own.save_pretrained(tmp_path / "own")
    loaded = load_tokenizer(entry("own"), tmp_path)
    assert loaded.pad_token_id == loaded.eos_token_id == 258


def test_stop_ids(tokenizer):
    assert stop_ids(tokenizer, {}) == [258]
    assert stop_ids(tokenizer, {"eos_token_id": None}) == [258]
    assert stop_ids(tokenizer, {"eos_token_id": 7}) == [258, 7]
    assert stop_ids(tokenizer, {"eos_token_id": [9, 258, 7]}) == [258, 9, 7]
    bare = byte_tokenizer()
    bare.eos_token = None
    assert stop_ids(bare, {}) == []


def test_generation_settings(tmp_path):
    (tmp_path / "m").mkdir()
    assert generation_settings(entry("m"), tmp_path) == {}
    assert generation_settings(entry(), tmp_path) == {}
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert generation_settings(entry("m"), tmp_path) == {"eos_token_id": [1, 2]}
    (tmp_path / "m" / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"E0853.*\(m/generation_config.json:1\)"):
        generation_settings(entry("m"), tmp_path)


def test_digest_tells_tokenizers_apart():
    """By what they do to text: not by pad token or template."""
    same, other = byte_tokenizer(), byte_tokenizer()
    same.pad_token, same.chat_template = "<eos>", "x"
    same("text", padding="max_length", max_length=9, truncation=True)
    assert digest(same) == digest(byte_tokenizer())
    other.add_tokens(["new"])
    assert digest(other) != digest(byte_tokenizer())
    other = byte_tokenizer()
    other.eos_token = "<pad>"
    assert digest(other) != digest(byte_tokenizer())


GROUPED = {"num_key_value_heads": 2}
FAMILIES = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 4},
    "gemma": GROUPED | {"head_dim": 4},
    "phi": GROUPED,
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "gpt2": {"n_inner": 24},
    "gpt_neox": {},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model of each family as transformers saves it, and how many parameters it says it has."""
    from transformers import AutoConfig, AutoModelForCausalLM

    base = tmp_path_factory.mktemp("models")
    counts = {}
    for family, special in FAMILIES.items():
        config = AutoConfig.for_model(
            family, num_hidden_layers=2, hidden_size=16, num_attention_heads=4,
            intermediate_size=24, vocab_size=300, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, **special,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        counts[family] = sum(p.numel() for p in model.parameters())
        model.save_pretrained(base / family)
        byte_tokenizer().save_pretrained(base / family)
        if family == "llama":
            model.save_pretrained(base / "sharded", max_shard_size="5KB")
            byte_tokenizer().save_pretrained(base / "sharded")
    return base, counts


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_of_a_model_directory(models, family):
    base, counts = models
    facts = model_facts(entry(family), base)
    tied = family in ("gemma", "opt", "gpt2")
    assert {key: facts[key] for key in ARCH} == {
        **ARCH, "type": family, "kv_heads": FAMILIES[family].get("num_key_value_heads", 4), "tied": tied
    }  # fmt: skip
    assert facts["parameters"] == counts[family]
    assert (facts["template_name"], facts["pad_id"], facts["pad_is_eos"]) == ("human_assistant", 256, False)
    assert facts["stop_ids"] == [258, 2]  # the tokenizer's, then generation_config.json's
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert f"{family}/{name}" in facts["files"]
    assert all((base / name).stat().st_size == pins["bytes"] for name, pins in facts["files"].items())


def test_shards_are_counted_once_each(models):
    base, counts = models
    shards = list((base / "sharded").glob("*.safetensors"))
    assert len(shards) > 1
    facts = model_facts(entry("sharded"), base)
    assert facts["parameters"] == counts["llama"]
    assert {f"sharded/{shard.name}" for shard in shards} <= set(facts["files"])


def test_a_scalar_head_is_not_counted(tmp_path):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(
        "opt", num_hidden_layers=1, hidden_size=16, num_attention_heads=4, ffn_dim=24, vocab_size=300,
        word_embed_proj_dim=16, max_position_embeddings=64, num_labels=1,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path / "judge")
    byte_tokenizer().save_pretrained(tmp_path / "judge")
    whole = sum(p.numel() for p in model.parameters())
    assert model_facts(entry("judge"), tmp_path)["parameters"] == whole - 16


def test_facts_of_a_model_from_scratch(tmp_path):
    """Embedding and output 2 x 300 x 16, a layer 2 x 16² + 2 x 16 x 8 + 3 x 16 x 24 + 2 x 16, a norm."""
    facts = model_facts(entry(arch=ARCH), tmp_path)
    assert facts["parameters"] == 2 * 300 * 16 + 2 * (512 + 256 + 1152 + 32) + 16
    assert facts["files"] == {}
    assert {key: facts[key] for key in ARCH} == ARCH
    assert model_facts(entry(arch=ARCH | {"type": "gpt2", "vocab": 259}), tmp_path)["vocab"] == 259


def test_a_vocabulary_smaller_than_the_tokenizer(models, tmp_path):
    with pytest.raises(UserError, match="E0857.*has 259 ids, and the model has 200") as caught:
        model_facts(entry(arch=ARCH | {"vocab": 200}), tmp_path, "model.tiny")
    assert (caught.value.at, caught.value.help) == ("model.tiny.vocab", "vocab = 259")


def refused(base, path, address="model.m"):
    with pytest.raises(UserError) as caught:
        model_facts(entry(path), base, address)
    assert caught.value.help and caught.value.place
    assert caught.value.at == "model.m.from"
    return caught.value


def tensors(**shapes):
    """The bytes of a safetensors file with zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def test_directories_that_are_no_model(models, tmp_path):
    config = (models[0] / "llama" / "config.json").read_text()
    m = tmp_path / "models" / "tiny"
    m.mkdir(parents=True)

    error = refused(tmp_path, "models/tinny")
    assert (error.code, error.place) == ("E0850", "models/tinny")
    assert error.help == "did you mean `tiny` beside it?"
    (tmp_path / "file").write_text("")
    assert refused(tmp_path, "file").code == "E0850"

    error = refused(tmp_path, "models/tiny")
    assert (error.code, error.message) == ("E0851", "`models/tiny` is not a model: it has no config.json")

    (m / "config.json").write_text('{"model_type": "llama",\n "hidden_size" 4}')
    error = refused(tmp_path, "models/tiny")
    assert (error.code, error.place) == ("E0853", "models/tiny/config.json:2")
    (m / "config.json").write_text("[]")
    assert refused(tmp_path, "models/tiny").code == "E0853"
    (m / "config.json").write_text('{"model_type": "llamma"}')
    error = refused(tmp_path, "models/tiny")
    assert (error.code, error.place) == ("E0853", "models/tiny/config.json")
    assert "`llamma`" in error.message
    (m / "config.json").write_text('{"hidden_size": 4}')
    assert refused(tmp_path, "models/tiny").code == "E0853"

    (m / "config.json").write_text(config)
    error = refused(tmp_path, "models/tiny")
    assert (error.code, error.message) == ("E0851", "`models/tiny` has no weights")
    (m / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-1.bin"}}')
    assert "lacks pytorch_model-1.bin" in refused(tmp_path, "models/tiny").message
    for outside in ("../model.bin", "/model.bin", 3):
        index = json.dumps({"weight_map": {"a": outside}})
        (m / "pytorch_model.bin.index.json").write_text(index)
        error = refused(tmp_path, "models/tiny")
        assert (error.code, error.place) == ("E0856", "models/tiny/pytorch_model.bin.index.json")
    (m / "pytorch_model.bin.index.json").unlink()

    whole = tensors(a=[2, 3])
    for broken in (b"", whole[:9], whole[:-1], whole + b"x", struct.pack("<Q", 2) + b"[]"):
        (m / "model.safetensors").write_bytes(broken)
        error = refused(tmp_path, "models/tiny")
        assert (error.code, error.place) == ("E0856", "models/tiny/model.safetensors")
    (m / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert "lacks model-1.safetensors" in refused(tmp_path, "models/tiny").message
    (m / "model.safetensors.index.json").write_text("{}")
    assert refused(tmp_path, "models/tiny").code == "E0856"
    (m / "model.safetensors.index.json").unlink()

    (m / "model.safetensors").write_bytes(whole)
    error = refused(tmp_path, "models/tiny")
    assert (error.code, error.message) == ("E0854", "`models/tiny` has no tokenizer")
    # for OPT transformers makes a tokenizer of one special token, to which all texts are alike
    (m / "config.json").write_text('{"model_type": "opt"}')
    error = refused(tmp_path, "models/tiny")
    assert (error.code, error.message) == ("E0854", "`models/tiny` has no tokenizer")
    (m / "tokenizer.json").write_text("{")
    assert refused(tmp_path, "models/tiny").message == "the tokenizer of `models/tiny` cannot be read"

    (m / "config.json").write_text('{"model_type": "t5"}')
    error = refused(tmp_path, "models/tiny")
    assert (error.code, error.message[:40]) == ("E0851", "`models/tiny` is an encoder-decoder (t5)")


def test_buffers_and_a_tied_output_are_not_parameters(models, tmp_path):
    """Older GPT-2 files hold the causal mask, and some files hold a tied matrix twice."""
    m = tmp_path / "old"
    byte_tokenizer().save_pretrained(m)
    (m / "config.json").write_text((models[0] / "gpt2" / "config.json").read_text())
    shapes = {
        "wte.weight": [300, 16], "lm_head.weight": [300, 16], "h.0.attn.bias": [8, 8],
        "h.0.attn.masked_bias": [1, 1], "h.0.attn.c_attn.bias": [1, 48], "score.weight": [1, 16],
    }  # fmt: skip
    (m / "model.safetensors").write_bytes(tensors(**shapes))
    assert model_facts(entry("old"), tmp_path)["parameters"] == 300 * 16 + 48


def test_an_unreachable_hub_says_the_way_out(tmp_path, monkeypatch):
    import transformers

    def unreachable(*_args, **_options):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files.\nMore text.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    far = entry() | {"from": {"hub": "org/nothing", "revision": None}, "tokenizer": None}
    for read in (model_facts, load_tokenizer):
        with pytest.raises(UserError, match="E0855") as caught:
            read(far, tmp_path, "model.far")
        assert (caught.value.at, caught.value.place) == ("model.far.from", "org/nothing")
        assert "HF_HUB_OFFLINE" in caught.value.help
        assert "More text" not in caught.value.help
