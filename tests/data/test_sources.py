"""Reading files: every kind that is supported, and every way in which one can be wrong."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys

import pytest

from rlhfdsl.data.sources import open_source
from rlhfdsl.language.diagnostics import UserError

ROWS = [{"prompt": "a, “b”\nc", "n": "1"}, {"prompt": "日本", "n": ""}]


def read(folder, name, **entry):
    folder.data("data.own", name, "prompt", **entry)
    source = open_source("data.own", folder.plan["data"]["data.own"], folder.base)
    return source, list(source.rows)


def refused(folder, name, **entry):
    """The error that reading gives, checked for the parts that every error must have."""
    with pytest.raises(UserError) as caught:
        read(folder, name, **entry)
    error = caught.value
    assert error.help and error.place and error.at.startswith("data.own.")
    assert "\n" not in error.message
    return error


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_text_files_give_their_rows_unchanged(folder, kind, zipped):
    table = {
        "jsonl": "\n\n".join(json.dumps(row) for row in ROWS),
        "json": json.dumps(ROWS, indent=1),
        "csv": '\ufeffprompt,n\r\n"a, “b”\nc",1\r\n日本,\r\n',
        "tsv": 'prompt\tn\n"a, “b”\nc"\t1\n日本\t\n',
    }[kind].encode()
    name = f"own.{kind}" + (".gz" if zipped else "")
    folder.write(name, gzip.compress(table) if zipped else table)
    source, rows = read(folder, name)
    assert [row for _, row in rows] == ROWS
    assert source.columns == ("prompt", "n")


def test_places_are_lines_where_there_are_lines(folder):
    folder.write("own.jsonl", '{"p": 1}\n\n{"p": 2}\n')
    source, rows = read(folder, "own.jsonl")
    assert [source.place(number) for number, _ in rows] == ["own.jsonl:1", "own.jsonl:3"]
    folder.write("own.csv", 'p\n"1\n1"\n2\n')
    source, rows = read(folder, "own.csv")
    assert [source.place(number) for number, _ in rows] == ["own.csv:2", "own.csv:4"]
    folder.write("own.json", '[{"p": 1},\n\n\n{"p": 2}]')
    source, rows = read(folder, "own.json")
    assert [source.place(number) for number, _ in rows] == ["own.json row 1", "own.json row 2"]


def test_text_that_looks_like_something_else_stays_text(folder):
    folder.write("own.csv", "p,q\n1,NA\nnull,2020-01-01\n")
    assert [row for _, row in read(folder, "own.csv")[1]] == [
        {"p": "1", "q": "NA"},
        {"p": "null", "q": "2020-01-01"},
    ]
    folder.write("own.jsonl", '{"p": "2020-01-01"}\n{"p": ["2020-01-02"]}\n')
    assert [row["p"] for _, row in read(folder, "own.jsonl")[1]] == ["2020-01-01", ["2020-01-02"]]


def test_json_lines_in_a_json_file(folder):
    folder.write("own.json", '{"p": "a"}\n{"p": "b"}\n')
    assert [row["p"] for _, row in read(folder, "own.json")[1]] == ["a", "b"]


def test_rows_takes_the_first_ones(folder):
    folder.write("own.jsonl", [{"p": i} for i in range(5)])
    assert [row["p"] for _, row in read(folder, "own.jsonl", rows=3)[1]] == [0, 1, 2]


def test_parquet_and_saved_directories(folder):
    import datasets
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder.base / "own.parquet")
    source, rows = read(folder, "own.parquet")
    assert [row for _, row in rows] == ROWS
    assert source.place(2) == "own.parquet row 2"

    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(folder.base / "one"))
    assert [row for _, row in read(folder, "one")[1]] == ROWS
    datasets.DatasetDict({"train": data, "held": data.select([1])}).save_to_disk(str(folder.base / "both"))
    assert [row for _, row in read(folder, "both", split="held")[1]] == ROWS[1:]

    error = refused(folder, "both", split="test")
    assert error.code == "E0817"
    assert error.at == "data.own.split"
    assert error.message == "`both` has no split `test`; it has `train`, `held`"
    assert refused(folder, "one", split="test").code == "E0817"
    (folder.base / "one" / "state.json").write_text("{")
    assert refused(folder, "one").code == "E0808"


BROKEN = [
    # name, content, code, place, part of the message, part of the help
    ("empty.jsonl", "", "E0804", "empty.jsonl", "is empty", "one row"),
    ("blank.jsonl", "\n \n", "E0804", "blank.jsonl", "has no rows", "one row"),
    ("none.json", "[]", "E0804", "none.json", "has no rows", "one row"),
    ("blank.json", "\n", "E0804", "blank.json", "is empty", "one row"),
    ("head.csv", "p,q\n", "E0804", "head.csv", "has no rows", "one row"),
    ("own.txt", "x", "E0803", "own.txt", "no suffix that says", ".jsonl"),
    (
        "latin.jsonl",
        '{"p": "a"}\n{"p": "café"}\n'.encode("latin-1"),
        "E0805",
        "latin.jsonl:2",
        "byte 0xe9",
        "iconv",
    ),
    (
        "wide.jsonl",
        '{"p": "a"}\n'.encode("utf-16"),
        "E0805",
        "wide.jsonl:1",
        "it is UTF-16",
        "iconv -f utf-16",
    ),
    (
        "latin.csv",
        "p\na\nb\ncafé\n".encode("latin-1"),
        "E0805",
        "latin.csv:4",
        "byte 0xe9",
        "iconv -f latin1",
    ),
    ("latin.json", '[{"p":\n"café"}]'.encode("latin-1"), "E0805", "latin.json:2", "byte 0xe9", "iconv"),
    ("half.jsonl", '{"p": "a"}\n{"p": "\\ud83d"}\n', "E0805", "half.jsonl:2", "half a character", "mend"),
    (
        "cut.jsonl",
        '{"p": "a"}\n\n{"p": "b"\n',
        "E0806",
        "cut.jsonl:3",
        "line 3 of `cut.jsonl` is not valid JSON: Expecting ',' delimiter at column 10",
        "that line",
    ),
    (
        "cut.json",
        '[{"p": "a"},\n {"p" "b"}]',
        "E0806",
        "cut.json:2",
        "Expecting ':' delimiter at column 7",
        "that line",
    ),
    ("list.jsonl", '[\n{"p": "a"}\n]', "E0806", "list.jsonl:1", "one JSON list", "suffix .json"),
    ("text.jsonl", '{"p": "a"}\n"b"\n', "E0807", "text.jsonl:2", "line 2 holds text", "one object a line"),
    (
        "object.json",
        '{"data": [{"p": "a"}]}',
        "E0807",
        "object.json",
        "it holds an object",
        "one object a line",
    ),
    ("number.json", "3", "E0807", "number.json", "it holds a number", "one object a line"),
    ("texts.json", '[{"p": "a"}, "b"]', "E0807", "texts.json", "item 2 is text", "one object a line"),
    ("short.csv", "p,q\n1,2\n3\n", "E0808", "short.csv:3", "has 1 cells, its header has 2", "quotes"),
    ("long.csv", "p,q\n1,2,3\n4,5,6\n", "E0808", "long.csv:2", "has 3 cells, its header has 2", "quotes"),
    ("quote.csv", 'p,q\n"a,b\nc,d\n', "E0808", "quote.csv:2", "is not valid csv", "close every quote"),
    ("twice.csv", "p,p\n1,2\n", "E0808", "twice.csv:1", "two columns `p`", "rename"),
    ("semicolons.csv", "p;q\n1;2\n", "E0808", "semicolons.csv:1", "is one cell, `p;q`", "by commas"),
    ("commas.tsv", "p,q\n1,2\n", "E0808", "commas.tsv:1", "is one cell, `p,q`", "by tabs"),
    ("bad.parquet", "PAR1xxxx", "E0808", "bad.parquet", "not a complete parquet file", "again"),
    ("plain.jsonl.gz", '{"p": "a"}\n', "E0809", "plain.jsonl.gz", "not a complete gzip file", "take .gz off"),
    (
        "cut.jsonl.gz",
        gzip.compress(os.urandom(99).hex().encode())[:40],
        "E0809",
        "cut.jsonl.gz",
        "not a complete gzip",
        "again",
    ),
]


@pytest.mark.parametrize(
    ("name", "content", "code", "place", "message", "help"), BROKEN, ids=[b[0] for b in BROKEN]
)
def test_a_broken_file_is_one_error_with_its_place(folder, name, content, code, place, message, help):
    folder.write(name, content)
    error = refused(folder, name)
    assert (error.code, error.place, error.at) == (code, place, "data.own.from")
    assert message in error.message
    assert help in error.help


def test_a_missing_file_names_its_neighbour(folder):
    folder.write("data/own.jsonl", [{"p": "a"}])
    error = refused(folder, "data/owm.jsonl")
    assert (error.code, error.place) == ("E0801", "data/owm.jsonl")
    assert error.help == "did you mean `own.jsonl` beside it?"
    assert "does not exist" in refused(folder, "elsewhere/own.jsonl").help
    assert refused(folder, "data/*.jsonl").help.startswith("a pattern is not read: name one file")


def test_a_directory_names_a_file_in_it(folder):
    folder.write("data/own.jsonl", [{"p": "a"}])
    error = refused(folder, "data")
    assert error.code == "E0802"
    assert 'from = "data/own.jsonl"' in error.help


def test_a_file_has_no_splits(folder):
    folder.write("own.jsonl", [{"p": "a"}])
    error = refused(folder, "own.jsonl", split="test")
    assert (error.code, error.at) == ("E0817", "data.own.split")


def test_a_file_that_the_system_refuses(folder, monkeypatch):
    path = folder.write("own.jsonl", [{"p": "a"}])

    def refuse(self, *_args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(path), "open", refuse)
    error = refused(folder, "own.jsonl")
    assert (error.code, error.message) == ("E0818", "`own.jsonl` cannot be read: Permission denied")


def test_an_unreachable_hub_says_the_way_out(folder):
    """In a process of its own: datasets reads HF_HUB_OFFLINE when it is imported."""
    code = (
        "from pathlib import Path\n"
        "from rlhfdsl.data.sources import open_source\n"
        "from rlhfdsl.language.diagnostics import UserError\n"
        "hub = {'hub': 'org/nothing', 'revision': None}\n"
        "entry = {'from': hub, 'subset': None, 'split': 'train', 'rows': None}\n"
        "try:\n"
        "    open_source('data.far', entry, Path('.'))\n"
        "except UserError as error:\n"
        "    print(error.code, error.at, error.place, 'save_to_disk' in error.help, sep='|')\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.base)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "E0815|data.far.from|org/nothing|True", done.stderr


def test_the_hub_is_asked_for_what_the_entry_says(folder, monkeypatch):
    import datasets

    asked = {}

    def load_dataset(name, subset, **options):
        asked.update(name=name, subset=subset, **options)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    entry = {"from": {"hub": "org/set", "revision": "v1"}, "subset": "en", "split": "test", "rows": None}
    source = open_source("data.far", entry, folder.base)
    assert asked == {"name": "org/set", "subset": "en", "split": "test", "revision": "v1"}
    assert [row for _, row in source.rows] == ROWS
    assert source.place(1) == "org/set row 1"

    def unknown(*_args, **_options):
        raise ValueError('Unknown split "test". Should be one of ["train"].')

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    with pytest.raises(UserError, match="E0816.*Unknown split") as caught:
        open_source("data.far", entry, folder.base)
    assert caught.value.place == "org/set"
