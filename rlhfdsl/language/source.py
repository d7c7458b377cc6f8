"""Read a recipe file: its text, or what is wrong with the file; and a table of its lines."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rlhfdsl.language.diagnostics import Diagnostic, Span
from rlhfdsl.language.strangers import START, stranger

SIZE_LIMIT = 1 << 20
NESTING_LIMIT = 64

# Characters that can make a text read differently from what it says (Trojan Source), and a lone carriage
# return, which editors show as a line end and the grammar does not.
_HIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]|\r(?!\n)")
_BRACKETS = re.compile(r'"(?:[^"\\\n]|\\.)*"|#[^\n]*|[\[({]|[\])}]')


# The text of a file that is held elsewhere than on the disk, by an editor or from stdin; None for others.
Overlay = Callable[[Path], "str | bytes | None"]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A text with a name; lines and columns count from 1, in code points.

    `folder` is where the file lies, seen from the recipe's folder: what its relative paths begin at.
    """

    name: str
    text: str
    folder: str = ""
    starts: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        starts = [0, *(match.end() for match in re.finditer("\n", self.text))]
        object.__setattr__(self, "starts", tuple(starts))

    def position(self, offset: int) -> tuple[int, int]:
        """Line and column of an offset."""
        line = bisect_right(self.starts, offset)
        return line, offset - self.starts[line - 1] + 1

    def line(self, number: int) -> str:
        """The text of a line, without its end."""
        end = self.starts[number] - 1 if number < len(self.starts) else len(self.text)
        return self.text[self.starts[number - 1] : end].rstrip("\r")

    def where(self, span: Span) -> str:
        """A place as `quickstart.rlhf:12:3`."""
        line, column = self.position(span.start)
        return f"{self.name}:{line}:{column}"

    def slice(self, span: Span) -> str:
        """The text of a span."""
        return self.text[span.start : span.end]


def read(
    path: Path, overlay: Overlay | None = None, folder: str = ""
) -> tuple[SourceFile | None, list[Diagnostic]]:
    """The file's text without a BOM; on trouble None, or a text not to be parsed, with the reasons."""
    name = path.as_posix()
    held = overlay(path) if overlay is not None else None
    if held is not None:
        return _decoded(held if isinstance(held, bytes) else held.encode(errors="surrogatepass"), name, folder)
    try:
        if not path.exists():
            near = sorted(p.name for p in path.parent.glob("*.rlhf"))[:5] if path.parent.is_dir() else []
            help = f"beside it: {', '.join(near)}" if near else START
            return _refuse("E0891", f"there is no file `{name}`", help)
        if not path.is_file():
            what = "a folder" if path.is_dir() else "not a regular file"
            return _refuse("E0892", f"`{name}` is {what}, and a recipe is a file", "name the .rlhf file itself")
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the name cannot be a path"
        return _refuse("E0891", f"`{name}` cannot be read: {reason}")
    return _decoded(data, name, folder)


def _decoded(data: bytes, name: str, folder: str) -> tuple[SourceFile | None, list[Diagnostic]]:
    """The text of a file's bytes."""
    other = stranger(data, name)
    if other is not None:
        return _refuse("E0895", f"`{name}` is not a recipe: it looks like {other[0]}", other[1])
    if len(data) > SIZE_LIMIT:
        return _refuse("E0901", f"`{name}` is larger than 1 MiB, the most that a recipe may have")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return _refuse(
            "E0893",
            f"`{name}` is not UTF-8: byte 0x{data[error.start]:02x} on line {line}",
            "save the file as UTF-8",
        )
    if not text.strip():
        return _refuse("E0894", f"`{name}` is empty", START)
    source = SourceFile(name, text, folder)
    return source, examine(source)


def _refuse(code: str, message: str, help: str | None = None) -> tuple[None, list[Diagnostic]]:
    return None, [Diagnostic(code, "error", message, help=help)]


def examine(source: SourceFile) -> list[Diagnostic]:
    """What makes a text unfit for the parser: hidden characters, and nesting beyond the limit."""
    problems = []
    for match in _HIDDEN.finditer(source.text):
        char = match.group()
        what = (
            "a carriage return without a newline"
            if char == "\r"
            else f"the hidden character U+{ord(char):04X}"
        )
        span = Span(source.name, match.start(), match.end())
        help = "use newlines as line ends" if char == "\r" else "delete it"
        problems.append(Diagnostic("E0110", "error", f"{what} has no place in a recipe", span, help=help))
    depth = 0
    for match in _BRACKETS.finditer(source.text):
        if match.group() in ("[", "(", "{"):
            depth += 1
            if depth > NESTING_LIMIT:
                span = Span(source.name, match.start(), match.end())
                message = f"brackets are nested deeper than {NESTING_LIMIT}"
                problems.append(Diagnostic("E0902", "error", message, span, "one too many"))
                break
        elif match.group() in ("]", ")", "}"):
            depth -= 1
    return problems
