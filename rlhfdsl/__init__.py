"""A declarative RLHF pipeline: recipes in a small language, compiled to a plan that DeepSpeed runs."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Give `rlhfdsl.load` on first use, so that `import rlhfdsl` itself costs nothing."""
    if name == "load":
        from rlhfdsl.language import load

        return load
    raise AttributeError(f"module 'rlhfdsl' has no attribute {name!r}")
