"""Turn a file of rated movie-review snippets into preference pairs.

    python prepare.py RATINGS.tsv OUT.jsonl
    python prepare.py --texts RATINGS.tsv OUT.jsonl   (the cleaned texts alone, without their ratings)

A line of RATINGS.tsv is `id<TAB>mean rating from -4 to 4<TAB>text`. Two snippets make a pair when they begin
with the same words, so that one prompt asks for both, and their ratings are at least GAP apart; the higher
rated one is chosen. The output is the same for the same input.
"""

import argparse
import html
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

LONGEST = 240  # characters of a snippet
GAP = 1.0  # in rating, between the two snippets of a pair
LARGEST = 120  # snippets for a prompt: data are split by prompt, so no prompt may outweigh the others

Snippet = tuple[float, str]  # rating, text


def clean(text: str) -> str:
    """Text with normal punctuation: the file writes '' for a quotation mark and wide spaces for a dash."""
    text = html.unescape(text).replace("''", '"').replace("`", "'")
    text = re.sub(r"\s{3,}", " - ", text.strip())
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\s([,.;:!?)])", r"\1", text).replace("( ", "(")
    text = re.sub(r"\.{3,}(?=[\w(])", "... ", text).lstrip(". ")
    text = re.sub(r"^\(([^()]+)\)", r"\1", text)  # an editor's insertion, "(Taymor) utilizes the idea"
    return text[:1].upper() + text[1:]


def read(path: Path) -> list[Snippet]:
    """The snippets of the file, each text once and none longer than LONGEST. SystemExit names a bad line."""
    ratings: dict[str, float] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                fields = line.rstrip("\n").split("\t", 2)
                if len(fields) != 3:
                    raise SystemExit(f"{path}:{number}: expected id, rating and text separated by tabs")
                try:
                    rating = float(fields[1])
                except ValueError:
                    raise SystemExit(f"{path}:{number}: the rating {fields[1]!r} is not a number") from None
                if not -4 <= rating <= 4:
                    raise SystemExit(f"{path}:{number}: the rating {fields[1]} is not between -4 and 4")
                text = clean(fields[2])
                if text and len(text) <= LONGEST:
                    ratings.setdefault(text, rating)
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SystemExit(f"{path}: not UTF-8 text") from None
    return [(rating, text) for text, rating in ratings.items()]


def match(group: list[Snippet]) -> list[tuple[Snippet, Snippet]]:
    """Pairs (better, worse) from the two halves of a group by rating; no snippet is in more than two."""
    group = sorted(group)
    if len(group) > LARGEST:  # thinned evenly over the ratings
        group = [group[i * len(group) // LARGEST] for i in range(LARGEST)]
    half = len(group) // 2
    low, high = group[:half], group[len(group) - half :]
    # A second round shifts the upper half by one; with one snippet in each half it would repeat the first.
    rounds = [high, high[1:] + high[:1]] if half > 1 else [high]
    pairs = [pair for upper in rounds for pair in zip(upper, low, strict=True)]
    return [(better, worse) for better, worse in pairs if better[0] - worse[0] >= GAP]


def preferences(snippets: list[Snippet]) -> list[dict[str, str]]:
    """Preference rows. A prompt names the first two words or, where these gave no partner, the first."""
    rows = []
    for words in (2, 1):
        groups = defaultdict(list)
        for rating, text in snippets:
            start = " ".join(text.split(" ")[:words])
            if start != text and '"' not in start:
                groups[start].append((rating, text))
        paired = set()
        for start, group in groups.items():
            for better, worse in match(group):
                prompt = f'Write a movie review that starts with "{start}".'
                rows.append({"prompt": prompt, "chosen": better[1], "rejected": worse[1]})
                paired |= {better, worse}
        snippets = [snippet for snippet in snippets if snippet not in paired]
    random.Random(0).shuffle(rows)  # the first rows of the file are then a fair sample
    return rows


def write(out: Path, rows: list[dict[str, str]]) -> None:
    """Write a row a line. SystemExit says what the system objects to."""
    try:
        with out.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise SystemExit(f"{out}: {error.strerror}") from None


def main() -> None:
    """Read the ratings, write the pairs or the texts, print the counts."""
    parser = argparse.ArgumentParser(description="Turn rated movie-review snippets into preference pairs.")
    parser.add_argument("ratings", type=Path, metavar="RATINGS.tsv")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--texts", action="store_true", help="write the texts alone, as rows of the format text")
    arguments = parser.parse_args()
    snippets = read(arguments.ratings)
    if arguments.texts:
        write(arguments.out, [{"text": text} for _, text in snippets])
        print(f"{arguments.out}: {len(snippets)} texts")
        return
    rows = preferences(snippets)
    if not rows:
        raise SystemExit(f"{arguments.ratings}: no two snippets begin alike and differ by {GAP} in rating")
    write(arguments.out, rows)
    prompts = Counter(row["prompt"] for row in rows)
    most = max(prompts.values())
    print(f"{arguments.out}: {len(rows)} pairs of {len(snippets)} snippets, {len(prompts)} prompts")
    print(f"the largest prompt has {most} pairs ({most / len(rows):.1%})")


if __name__ == "__main__":
    main()
