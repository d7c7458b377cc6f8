"""The nearest right names to a wrong one."""

from __future__ import annotations

from collections.abc import Iterable


def distance(a: str, b: str) -> int:
    """Damerau-Levenshtein distance, each place changed once (optimal string alignment)."""
    previous: list[int] = []
    current = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, previous, current = previous, current, [i]
        for j, right in enumerate(b, 1):
            cost = min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (left != right))
            if i > 1 and j > 1 and left == b[j - 2] and a[i - 2] == right:
                cost = min(cost, before[j - 2] + 1)
            current.append(cost)
    return current[-1]


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """At most `limit` known names within a third of the name's length, the nearest first."""
    low = name.lower()
    reach = 1 if len(name) < 5 else max(2, len(name) // 3)
    scored = [(distance(low, word.lower()), word) for word in known if abs(len(word) - len(name)) <= reach]
    return [word for score, word in sorted(scored) if score <= reach][:limit]


def either(names: Iterable[str]) -> str:
    """`a, b or c`, for a sentence."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def a(name: str) -> str:
    """A name in backquotes with its article: "a `kl`", "an `actor`"."""
    return f"{'an' if name.startswith(('a', 'e', 'i', 'o', 'u')) else 'a'} `{name}`"


def listed(names: Iterable[str]) -> str:
    """Names in backquotes, for a sentence."""
    return ", ".join(f"`{name}`" for name in names)
