"""Completion inside `deepspeed { }`, which comes from the key table of DeepSpeed."""

from __future__ import annotations

from rlhfdsl.language import load
from rlhfdsl.lsp.complete import complete

HEAD = 'recipe "x" { }\nstage sft {\n  deepspeed { '


def labels(tmp_path, text: str) -> set[str]:
    path = tmp_path / "t.rlhf"
    path.write_text(text + "\n", encoding="utf-8")
    return {item.label for item in complete(text, len(text), load(path))[1]}


def test_a_brace_too_many(tmp_path):
    text = 'recipe "x" { }\noverride blend.all {\n  mix {{ '
    assert isinstance(labels(tmp_path, text), set)


def test_keys_and_blocks_of_deepspeed(tmp_path):
    assert {"steps_per_print", "zero_optimization", "aio"} <= labels(tmp_path, HEAD)
    inside = labels(tmp_path, HEAD + "zero_optimization { ")
    assert {"reduce_bucket_size", "offload_param"} <= inside and "stage" not in inside
    assert labels(tmp_path, HEAD + "zero_optimization { reduce_scatter = ") == {"on", "off"}
