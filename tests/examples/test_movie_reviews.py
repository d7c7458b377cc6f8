"""The movie-review example: ratings in, preference pairs out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "movie-reviews" / "prepare.py"

RATINGS = [
    ("2.5", "The film is a joy , from ''hello'' to the end."),
    ("-2.0", "The film    all two hours of it    is a chore."),
    ("1.0", "The film has charm &amp; wit."),
    ("0.5", "The film is fine."),
    ("-1.0", "Dull and loud."),
    ("2.0", "Dull it is not."),
    ("0.4", "One laugh."),
    ("0.0", "One of many."),
    ("3.0", "Alone in its group."),
    ("3.9", "The film " + "goes on " * 40),  # longer than 240 characters
]


def prepare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture
def ratings(tmp_path: Path) -> Path:
    path = tmp_path / "ratings.tsv"
    lines = [f"{number}\t{rating}\t{text}\r\n" for number, (rating, text) in enumerate(RATINGS, 1)]
    path.write_bytes("".join(lines).encode())
    return path


def test_pairs(ratings: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    done = prepare(ratings, out)
    assert done.returncode == 0, done.stderr
    film = 'Write a movie review that starts with "The film".'
    dull = 'Write a movie review that starts with "Dull".'
    joy, charm = 'The film is a joy, from "hello" to the end.', "The film has charm & wit."
    chore, fine = "The film - all two hours of it - is a chore.", "The film is fine."
    # Sorted by rating "The film" has chore -2, fine 0.5 | charm 1, joy 2.5. Round one pairs chore with charm
    # and fine with joy, round two chore with joy; fine and charm are only 0.5 apart. "Dull and" and "Dull it"
    # find no partner, so they meet at "Dull". The two at "One" are 0.4 apart.
    assert {tuple(json.loads(line).values()) for line in out.read_text(encoding="utf-8").splitlines()} == {
        (film, charm, chore),
        (film, joy, fine),
        (film, joy, chore),
        (dull, "Dull it is not.", "Dull and loud."),
    }
    assert "4 pairs of 9 snippets, 2 prompts" in done.stdout
    assert "3 pairs (75.0%)" in done.stdout


def test_texts_alone(ratings: Path, tmp_path: Path) -> None:
    out = tmp_path / "texts.jsonl"
    done = prepare("--texts", ratings, out)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == {"text": 'The film is a joy, from "hello" to the end.'}
    assert len(rows) == 9 and "9 texts" in done.stdout  # all but the one of more than 240 characters


def test_same_output_for_same_input(ratings: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    prepare(ratings, first)
    prepare(ratings, second)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "ratings.tsv: No such file or directory"),
        (b"1\t2.0\tA film.\n2\t1.0\n", "ratings.tsv:2: expected id, rating and text separated by tabs"),
        (b"1\tgood\tA film.\n", "ratings.tsv:1: the rating 'good' is not a number"),
        (b"1\tnan\tA film.\n", "ratings.tsv:1: the rating nan is not between -4 and 4"),
        (b"1\t2.0\tA film \xff.\n", "ratings.tsv: not UTF-8 text"),
        (b"1\t2.0\tA film.\n", "ratings.tsv: no two snippets begin alike and differ by 1.0 in rating"),
    ],
)
def test_one_line_errors(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "ratings.tsv"
    if content is not None:
        path.write_bytes(content)
    done = prepare(path, tmp_path / "out.jsonl")
    assert done.returncode == 1
    assert done.stderr.strip() == f"{tmp_path}/{message}"
    assert not (tmp_path / "out.jsonl").exists()
