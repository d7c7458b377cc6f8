"""The key table of `deepspeed { }` against the installed DeepSpeed."""

from __future__ import annotations

from rlhfdsl.engines import deepspeed_keys
from rlhfdsl.language import schema
from rlhfdsl.language.resources import resource


def test_the_table_is_fresh():
    text = (resource("grammar") / "deepspeed.schema.json").read_text(encoding="utf-8")
    assert text == deepspeed_keys.generate()


def test_every_key_of_deepspeed_is_passed_on_or_told_why_not():
    for path, keys in deepspeed_keys._sections().items():
        definition = schema.definition(f"deepspeed.{path}" if path else "deepspeed")
        known = {*definition.attributes, *definition.blocks}
        known |= {*definition.table["x-derived"], *definition.table["x-unused"]}
        assert known == keys.keys(), path


def test_deepspeed_takes_each_example():
    """The examples of a block's keys together, as DeepSpeed's own model reads them."""
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from rlhfdsl.language.evaluate import Evaluator
    from rlhfdsl.language.parser import parse_assignment
    from rlhfdsl.language.source import SourceFile
    from rlhfdsl.language.values import INVALID, fit

    def examples(type_: str) -> dict:
        out = {}
        for attr in schema.definition(type_).attributes.values():
            assignment, problems = parse_assignment(SourceFile("t", attr.example))
            value = Evaluator({}, {}, problems, True).value(assignment.value)
            out[attr.name] = next(v for a in attr.alternatives if (v := fit(a, value)) is not INVALID)
        return out

    zero = examples("deepspeed.zero_optimization") | {"stage": 3}
    for block in ("offload_param", "offload_optimizer"):
        zero[block] = examples(f"deepspeed.zero_optimization.{block}") | {"device": "nvme", "nvme_path": "/nvme"}
    assert DeepSpeedZeroConfig(**zero).reduce_bucket_size == zero["reduce_bucket_size"]
    assert DeepSpeedFP16Config(**examples("deepspeed.fp16")).hysteresis == 2
