"""Command lines and configurations of other tools to a recipe, with a note for all that does not go over."""

from rlhfdsl.language.foreign.reading import Command, Unreadable, read_command
from rlhfdsl.language.foreign.writing import Imported, convert

__all__ = ["Command", "Imported", "Unreadable", "convert", "read_command"]
