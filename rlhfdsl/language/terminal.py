"""Text from recipes, data and models on its way to a terminal, where control characters would be commands."""

from __future__ import annotations

import re

# C0 and C1 controls but tab and line feed; characters of no width and those that turn the direction of writing, which
# make a line read as something else; line separators; halves of characters, which no stream can encode.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """The text with every character that could act on a terminal, or hide, written as an escape: `\\x1b`."""
    return _UNSAFE.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), text)


def same_width(text: str) -> str:
    """The text with a replacement character for each of those, for a line with marks under its columns."""
    return _UNSAFE.sub("\ufffd", text)
