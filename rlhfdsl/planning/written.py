"""What a stage leaves on the disk: directories, and their bytes."""

from __future__ import annotations

from typing import Any

from rlhfdsl.planning.entries import Model
from rlhfdsl.planning.layout import Placement
from rlhfdsl.planning.memory import BYTES

Json = dict[str, Any]


def writes_of(path: str, model: Model, placed: Placement, name: str, suffix: str = "") -> tuple[Json, list[Json]]:
    """What an engine leaves: artifacts (name: directory), and the directories with their bytes.

    The model is whole. With LoRA its adapters are merged into it, and stand beside it on their own.
    """
    need, width = placed.need, BYTES[model.dtype]
    counts = {name: (path + suffix, model.count(need.head))}
    if need.lora is not None:
        counts[f"{name}_adapter"] = f"{path}{suffix}-adapter", need.trained
    artifacts = {key: directory for key, (directory, _) in counts.items()}
    return artifacts, [
        {"path": directory, "bytes": None if count is None else count * width} for directory, count in counts.values()
    ]
