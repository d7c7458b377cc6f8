"""`rlhf chat` with a model's folder: what is typed, what cannot be talked to, and what does not fit."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from command import rlhf
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhfdsl.cli.chat import fitted
from rlhfdsl.models.tokenizers import HUMAN_ASSISTANT, byte_tokenizer

CONTEXT = 64
DATED = "{{ strftime_now('%Y') }} {% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}"
DATED += "{% endif %}{{ m.content }}{% endfor %}"


def make(folder: Path, kind: type, template: str | None) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=CONTEXT, num_labels=1, pad_token_id=256, bos_token_id=257, eos_token_id=258,
    )  # fmt: skip
    kind(config).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("policy"), LlamaForCausalLM, HUMAN_ASSISTANT)


def chat(capsys, monkeypatch, typed: bytes, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    return rlhf(capsys, "chat", *arguments)


def test_bytes_that_are_no_text_and_a_line_that_is_too_long(policy, capsys, monkeypatch):
    code, out, err = chat(capsys, monkeypatch, b"\xff\xfe oak\n", policy, "--tokens", "3")
    assert code == 0 and out.strip() and not err
    code, out, err = chat(capsys, monkeypatch, b"oak\n", policy, "--tokens", "3", "--system", "b\udcffe kind")
    assert code == 0 and out.strip() and not err
    code, out, err = chat(capsys, monkeypatch, b"oak " * 40 + b"\n", policy, "--tokens", "500")
    # <bos> and a token for each byte; half of the context is kept for the question
    written = 1 + len(b"\n\nHuman: ") + len(b"oak " * 40) - 1 + len(b"\n\nAssistant:")
    assert code == 0 and err == f"(of {written} tokens the model reads the last {CONTEXT // 2})\n"


def test_without_an_input(policy, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    code, _, err = rlhf(capsys, "chat", policy)
    assert code == 0 and not err


def test_a_model_without_a_template_is_told_of(tmp_path, capsys, monkeypatch):
    code, out, err = chat(capsys, monkeypatch, b"oak\n", make(tmp_path, LlamaForCausalLM, None), "--tokens", "3")
    assert code == 0 and out.strip() and "no chat template" in err


def test_a_template_reads_the_date_of_the_training_and_may_refuse(tmp_path, capsys, monkeypatch):
    folder = make(tmp_path, LlamaForCausalLM, DATED)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = DATED
    ids = fitted(tokenizer, [{"role": "user", "content": "oak"}], 64)
    assert tokenizer.decode(ids[0]) == "2024 oak"
    code, _, err = chat(capsys, monkeypatch, b"oak\n", folder, "--system", "be kind")
    assert code == 1 and "E0832" in err and "template refuses this conversation" in err


def test_what_writes_no_text_and_what_is_damaged(policy, tmp_path, capsys, monkeypatch):
    reward = make(tmp_path / "reward", LlamaForSequenceClassification, HUMAN_ASSISTANT)
    code, _, err = chat(capsys, monkeypatch, b"oak\n", reward)
    assert code == 1 and "no weights for `lm_head.weight`" in err
    damaged = tmp_path / "damaged"
    shutil.copytree(policy, damaged)
    (damaged / "model.safetensors").write_bytes(b"x" * 1000)
    code, _, err = chat(capsys, monkeypatch, b"oak\n", damaged)
    assert code == 1 and "cannot be loaded" in err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--tokens", "0"), ("--tokens", "-3"), ("--temperature", "nan"), ("--temperature", "-1"), ("--seed", "x"),
        ("--seed", str(1 << 64)),
    ],
)
def test_options_out_of_range(policy, capsys, option, value):
    code, _, err = rlhf(capsys, "chat", policy, option, value)
    assert code == 2 and f"argument {option}: " in err


def test_a_folder_of_no_run(tmp_path, capsys):
    (tmp_path / "plan.json").write_text(json.dumps({"format_version": "1.0"}))
    code, _, err = rlhf(capsys, "chat", tmp_path)
    assert code == 1 and "E0720" in err
    code, _, err = rlhf(capsys, "chat", tmp_path / "ppo")
    assert code == 1 and f"for a stage of a run: `rlhf chat {tmp_path} --stage ppo`" in err
