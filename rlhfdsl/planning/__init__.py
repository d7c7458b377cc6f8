"""Recipe to plan: see README.md for the order of the parts."""

from rlhfdsl.planning.compile import compile

__all__ = ["compile"]
