"""The key table of the `deepspeed { }` escape, grammar/deepspeed.schema.json, made from the installed DeepSpeed.

Types, bounds and most of the docs come from DeepSpeed's own config models, the top-level keys from what
`DeepSpeedConfig` asks of the dict that it is given. What is decided by hand stands in deepspeed_choices.py.

`python -c "from rlhfdsl.engines import deepspeed_keys; deepspeed_keys.write()"` makes the file anew; a test fails
when it is older than the pinned DeepSpeed.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from rlhfdsl.engines.deepspeed_choices import (
    CHOICES,
    DERIVED,
    DOCS,
    EXAMPLES,
    LOGS,
    NVME,
    RESULT,
    UNUSED,
    ZERO_3,
    ZERO_12,
)
from rlhfdsl.language.resources import resource

_LARGEST = 10**12  # of an integer that DeepSpeed does not bound


def generate() -> str:
    """The text of the file: a definition for each block, in the shape of grammar/recipe.schema.json."""
    import deepspeed

    definitions = {path: _definition(path, keys) for path, keys in _sections().items()}
    out = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "keys of deepspeed { }",
        "description": f"Generated from DeepSpeed {deepspeed.__version__} by rlhfdsl/engines/deepspeed_keys.py.",
        "$defs": {_type(path): definition for path, definition in definitions.items()},
    }
    return json.dumps(out, indent=1, ensure_ascii=False) + "\n"


def write() -> None:
    """Write the file anew."""
    (resource("grammar") / "deepspeed.schema.json").write_text(generate(), encoding="utf-8")


def _type(path: str) -> str:
    return f"deepspeed.{path}" if path else "deepspeed"


# ---- what DeepSpeed has


def _sections() -> dict[str, dict[str, dict[str, Any]]]:
    """Block: its keys, each {"schema", "doc", "alias"}, or {} for one that is known by name only."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.profiling import config as profiling
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {"zero_optimization": DeepSpeedZeroConfig, "fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config}
    models |= {"comms_logger": CommsLoggerConfig, "tensorboard": TensorBoardConfig, "wandb": WandbConfig}
    models |= {"csv_monitor": CSVConfig}
    profiler: dict[str, Any] = {}
    _recording(profiling, profiler, lambda: profiling.DeepSpeedFlopsProfilerConfig({}))
    plain = {"flops_profiler": profiler, "aio": AIO_DEFAULT_DICT}
    top = _top()
    out: dict[str, dict[str, dict[str, Any]]] = {
        "": {name: {} if name in models or name in plain else _by_default(name, top[name]) for name in top}
    }
    for name, model in models.items():
        out |= _model(name, model)
    for name, defaults in plain.items():
        out[name] = {key: _by_default(key, value) for key, value in defaults.items()}
    return out


class _Asked(dict[str, Any]):
    """A configuration that remembers which keys it was asked for, and with which default."""

    def __init__(self, **given: Any) -> None:
        super().__init__(given)
        self.asked: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        if self.asked.get(key) is None:
            self.asked[key] = default
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.setdefault(str(key), None)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.setdefault(key, None)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return self


def _top() -> dict[str, Any]:
    """Every top-level key that DeepSpeed asks for, with its default."""
    from deepspeed.runtime import config as runtime

    given = _Asked(train_batch_size=1)
    kept = runtime.dist.get_rank, runtime.dist.get_world_size
    runtime.dist.get_rank, runtime.dist.get_world_size = lambda *_: 0, lambda *_: 1
    try:
        runtime.DeepSpeedConfig(given)
    finally:
        runtime.dist.get_rank, runtime.dist.get_world_size = kept
    return dict(sorted(given.asked.items()))


def _recording(module: types.ModuleType, into: dict[str, Any], make: Any) -> None:
    """What `make` asks of a dict by the module's `get_scalar_param`."""
    kept = module.get_scalar_param

    def asked(given: Any, key: str, default: Any) -> Any:
        into[key] = default
        return default

    module.get_scalar_param = asked  # type: ignore[attr-defined]
    try:
        make()
    finally:
        module.get_scalar_param = kept  # type: ignore[attr-defined]


def _model(path: str, model: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """The keys of a pydantic model, and of those inside it, by path."""
    docs = _docstrings(model)
    keys: dict[str, dict[str, Any]] = {}
    inner: dict[str, dict[str, dict[str, Any]]] = {}
    for field, info in model.model_fields.items():
        name = info.alias or field
        nested = next((a for a in _alternatives(info.annotation) if hasattr(a, "model_fields")), None)
        if nested is not None:
            keys[name] = {}
            if name not in UNUSED.get(path, {}):
                inner |= _model(f"{path}.{name}", nested)
            continue
        alternatives = [a for a in (_schema(a, info.metadata) for a in _alternatives(info.annotation)) if a]
        keys[name] = {
            "schema": alternatives, "doc": docs.get(field, ""), "default": info.default,
            "alias": field if field != name else None,
        }  # fmt: skip
    return {path: keys} | inner


def _docstrings(model: Any) -> dict[str, str]:
    """The text below each field of a class, which pydantic does not keep."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(body, ast.ClassDef)
    out = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            out[field.target.id] = str(ast.literal_eval(after.value))
    return out


def _alternatives(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        yield from typing.get_args(annotation)
    else:
        yield annotation


def _schema(type_: Any, metadata: Any = ()) -> dict[str, Any]:
    bounds: dict[str, Any] = {}
    for one in metadata:
        for name, key in (("ge", "minimum"), ("gt", "exclusiveMinimum"), ("le", "maximum"), ("lt", "exclusiveMaximum")):
            if getattr(one, name, None) is not None:
                bounds[key] = getattr(one, name)
    if type_ is bool:
        return {"type": "boolean"}
    if type_ is int:
        if "exclusiveMinimum" in bounds:
            bounds["minimum"] = int(bounds.pop("exclusiveMinimum")) + 1
        return {"type": "integer", "minimum": 0, "maximum": _LARGEST} | bounds
    if type_ is float:
        return {"type": "number"} | (bounds or {"minimum": 0})
    if type_ is type(None):
        return {"const": None}
    if inspect.isclass(type_) and issubclass(type_, Enum):
        return {"enum": [one.value for one in type_]}
    if inspect.isclass(type_) and issubclass(type_, str | Path):
        return {"type": "string", "minLength": 1}
    return {}


def _by_default(name: str, default: Any) -> dict[str, Any]:
    """A key that DeepSpeed describes by its default alone."""
    if name in CHOICES:
        return {"schema": [{"enum": CHOICES[name]}], "doc": "", "default": default, "alias": None}
    least = {"module_depth": -1, "steps_per_print": 1}
    if name in least:
        integer = {"type": "integer", "minimum": least[name], "maximum": _LARGEST}
        return {"schema": [integer], "doc": "", "default": default, "alias": None}
    known = {"recompute_fwd_factor": float, "output_file": str}
    type_ = known.get(name, type(default))
    return {"schema": [_schema(type_)], "doc": "", "default": default, "alias": None}


# ---- what a recipe gets


def _definition(path: str, keys: dict[str, dict[str, Any]]) -> dict[str, Any]:
    derived, unused = DERIVED.get(path, {}), UNUSED.get(path, {})
    unknown = (derived.keys() | unused.keys()) - keys.keys()
    assert not unknown, f"DeepSpeed has no {unknown} in {path or 'its configuration'}"
    properties: dict[str, Any] = {}
    for name, key in keys.items():
        if name in derived or name in unused:
            continue
        whole = f"{path}.{name}" if path else name
        properties[name] = _property(whole, key) if key else {"$ref": f"#/$defs/{_type(whole)}"}
    title = path.rpartition(".")[2] or "deepspeed"
    about = "Settings passed on to DeepSpeed; the plan's own stand where nothing is written."
    return {
        "title": title,
        "description": about if not path else f"The part `{path}` of DeepSpeed's configuration.",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "x-derived": derived,
        "x-unused": unused,
    }


def _property(path: str, key: dict[str, Any]) -> dict[str, Any]:
    section, _, name = path.rpartition(".")
    alternatives = key["schema"]
    assert alternatives and all(alternatives), f"no type for {path}"
    out: dict[str, Any] = {"description": _doc(name, key["doc"])}
    out |= alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives}
    out["examples"] = [EXAMPLES.get(name) or _example(alternatives[0], key["default"])]
    result = any(word in path for word in RESULT)
    out["x-affects"] = "result" if result else "none" if section in LOGS else "speed"
    needs = _needs(path, section, name)
    out |= {"x-needs": needs} if needs else {}
    out |= {"x-aliases": {"DeepSpeed": [key["alias"]]}} if key["alias"] else {}
    return out | {"x-deepspeed": path}


def _needs(path: str, section: str, name: str) -> str | None:
    if name in NVME:
        return "nvme"
    if section in ("fp16", "bf16", "zero_optimization.offload_param", "zero_optimization.offload_optimizer"):
        return section.rpartition(".")[2]
    if section == "aio":
        return "nvme"
    if section == "zero_optimization":
        if name.startswith("stage3_") or name in ZERO_3:
            return "zero 3"
        return "zero 1 2" if name in ZERO_12 else "zero 1 2 3"
    return "zero 0" if name in ("prescale_gradients", "gradient_predivide_factor") else None


def _doc(name: str, text: str) -> str:
    """One sentence, as the table of the language has them: no capital at its head, no full stop at its end."""
    if name in DOCS:
        return DOCS[name]
    sentence = " ".join(text.replace("``", "`").split()).partition(". ")[0].rstrip(".").strip()
    assert sentence, f"no doc for {name}"
    return sentence if sentence[:2].isupper() else sentence[0].lower() + sentence[1:]


def _example(alternative: dict[str, Any], default: Any) -> str:
    if "enum" in alternative:
        return str(alternative["enum"][-1])
    if alternative["type"] == "boolean":
        return "off" if default is True else "on"
    if alternative["type"] == "string":
        return '"mine"'
    if default is None or default > 1e12:
        return "1_000_000"
    return f"{int(default):_}" if alternative["type"] == "integer" else f"{float(default):g}"
