"""Where rows come from: local files, directories that `datasets` saved, data sets of the Hugging Face hub.

JSON and csv files are read here, strictly, and not by `datasets`, whose readers change what they read: a
column that holds text in one row and a list in another comes back as JSON source text, text that looks like
a date as a timestamp, and a csv whose rows have one cell more than its head comes back shifted by a column.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from rlhfdsl.data import codes
from rlhfdsl.language.diagnostics import UserError, first_line
from rlhfdsl.models.sources import pin

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz", ".tsv.gz")

Rows = Iterator[tuple[int, dict[str, Any]]]

# A read of Arrow data takes this many rows at a time.
_CHUNK = 1000


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of one `data` block, opened.

    columns: the column names; of a file without a head, those of its first row.
    rows: (number, row) pairs; the number is the line where the row begins (`lines`) or its count from 1.
    """

    address: str
    name: str
    columns: tuple[str, ...]
    lines: bool
    rows: Rows

    def place(self, number: int) -> str:
        """Where a row is, for an error: `data/own.jsonl:17`, or `data/own.parquet row 17`."""
        return f"{self.name}:{number}" if self.lines else f"{self.name} row {number}"


def open_source(address: str, entry: Mapping[str, Any], base: Path) -> Source:
    """Open a `data` entry of the plan. Rows are read as they are asked for, the first `rows` of them.

    base: the folder that a path of the entry is relative to.
    Raises UserError here or while rows are read: for a file that is missing, empty, broken or of an unknown
    kind, a data set, subset or split that does not exist, and a hub that cannot be reached.
    """
    hub = "hub" in entry["from"]
    source = _hub(address, entry) if hub else _Local(address, entry, base).open()
    first = next(source.rows, None)
    if first is None:
        raise UserError(
            codes.FILE_EMPTY,
            f"`{source.name}` has no rows",
            at=f"{address}.from",
            place=source.name,
            help="give it at least one row",
        )
    columns = source.columns or tuple(first[1])
    rows = islice(_chain(first, source.rows), entry["rows"])
    return Source(address, source.name, columns, source.lines, rows)


def files(entry: Mapping[str, Any], base: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of each file of a local entry; nothing for the hub, where the revision says it."""
    if "hub" in entry["from"]:
        return {}
    named = entry["from"]["path"]
    root = base / named
    return pin(named, root, sorted(p for p in root.rglob("*")) if root.is_dir() else [root])


def name_of(entry: Mapping[str, Any]) -> str:
    """The hub id or path of an entry, as facts and errors name it."""
    return entry["from"].get("hub") or entry["from"]["path"]


def _chain(first: tuple[int, dict], rest: Rows) -> Rows:
    yield first
    yield from rest


@dataclass(frozen=True, slots=True)
class _Local:
    """A file or directory that a recipe names, and how to complain about it."""

    address: str
    entry: Mapping[str, Any]
    base: Path

    @property
    def named(self) -> str:
        return self.entry["from"]["path"]

    @property
    def path(self) -> Path:
        return self.base / self.named

    def error(
        self, code: str, message: str, help: str, line: int | None = None, setting: str = "from"
    ) -> UserError:
        place = self.named if line is None else f"{self.named}:{line}"
        return UserError(code, message, at=f"{self.address}.{setting}", place=place, help=help)

    def open(self) -> Source:
        if not self.path.exists():
            raise self.error(codes.FILE_MISSING, f"there is no file `{self.named}`", self._nearest())
        if self.path.is_dir():
            return self._saved()
        kind = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if self.path.name.endswith(s)), None)
        if kind is None:
            raise self.error(
                codes.UNKNOWN_SUFFIX,
                f"`{self.named}` has no suffix that says what it is",
                f"use one of {', '.join(SUFFIXES)}",
            )
        if self.entry["split"] != "train":
            raise self._no_split(["train"], "a file has no splits: leave `split` out")
        if self.path.stat().st_size == 0:
            raise self.error(codes.FILE_EMPTY, f"`{self.named}` is empty", "give it at least one row")
        if kind == ".parquet":
            return self._parquet()
        columns: tuple[str, ...] = ()
        if kind.startswith(".jsonl"):
            rows, lines = self._json_lines(), True
        elif kind.startswith(".json"):
            rows, lines = self._json()
        else:
            rows, lines = self._csv("\t" if kind.startswith(".tsv") else ","), True
        return Source(self.address, self.named, columns, lines, rows)

    def _nearest(self) -> str:
        folder = self.path.parent
        if set("*?[") & set(self.named):
            return "a pattern is not read: name one file, or mix several `data` blocks in a blend"
        if not folder.is_dir():
            return "its folder does not exist; paths are relative to the recipe"
        near = difflib.get_close_matches(self.path.name, [p.name for p in folder.iterdir()], n=1)
        return f"did you mean `{near[0]}` beside it?" if near else "paths are relative to the recipe"

    def _no_split(self, there: list[str], help: str) -> UserError:
        wanted = self.entry["split"]
        listed = ", ".join(f"`{name}`" for name in there)
        message = f"`{self.named}` has no split `{wanted}`; it has {listed}"
        return self.error(codes.SPLIT, message, help, setting="split")

    def _binary(self) -> BinaryIO:
        return gzip.open(self.path, "rb") if self.path.suffix == ".gz" else self.path.open("rb")

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Numbered lines with their ends, decoded."""
        try:
            with self._binary() as file:
                for number, raw in enumerate(file, 1):
                    yield number, self._decoded(raw, number)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise self.error(
                codes.BROKEN_ARCHIVE,
                f"`{self.named}` is not a complete gzip file: {first_line(error)}",
                "compress it again, or take .gz off the name of a plain file",
            ) from error
        except OSError as error:
            raise self.error(
                codes.UNREADABLE, f"`{self.named}` cannot be read: {error.strerror}", "check its permissions"
            ) from error

    def _decoded(self, raw: bytes, number: int) -> str:
        try:
            return raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            wide = number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff")
            found = "it is UTF-16" if wide else f"byte 0x{raw[error.start]:02x} in line {number} is none"
            raise self.error(
                codes.ENCODING,
                f"`{self.named}` is not UTF-8: {found}",
                f"convert it: iconv -f {'utf-16' if wide else 'latin1'} -t utf-8 {self.path.name}",
                number,
            ) from error

    def _json_lines(self) -> Rows:
        for number, line in self._lines():
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip())  # a row that was cut ends where its text does, not on the next line
            except (json.JSONDecodeError, RecursionError) as error:
                if number == 1 and line.lstrip()[0] == "[":
                    raise self.error(
                        codes.BROKEN_JSON,
                        f"`{self.named}` is one JSON list and not one object a line",
                        "give its name the suffix .json",
                        1,
                    ) from error
                raise self._bad_json(number, error) from error
            self._check_surrogates(line, row, number)
            if not isinstance(row, dict):
                raise self._no_table(f"line {number} holds {kind_of(row)}, not an object", number)
            yield number, row

    def _json(self) -> tuple[Rows, bool]:
        """The rows of a .json file, a list of objects or one object a line, and whether numbers are lines."""
        text = "".join(line for _, line in self._lines())
        if not text.strip():
            raise self.error(codes.FILE_EMPTY, f"`{self.named}` is empty", "give it at least one row")
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            if text.lstrip()[0] == "{" and _is_json(text.lstrip().split("\n", 1)[0]):
                return self._json_lines(), True
            raise self._bad_json(getattr(error, "lineno", 1), error) from error
        self._check_surrogates(text, value, None)
        if not isinstance(value, list):
            raise self._no_table(f"it holds {kind_of(value)}, not a list of objects")
        for count, row in enumerate(value, 1):
            if not isinstance(row, dict):
                raise self._no_table(f"item {count} is {kind_of(row)}, not an object")
        return iter(enumerate(value, 1)), False

    def _check_surrogates(self, text: str, value: Any, line: int | None) -> None:
        """JSON can spell half a character (\\ud83d alone), which is no text and which no tokenizer takes."""
        if "\\ud" in text or "\\uD" in text:
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = f"\\u{ord(error.object[error.start]):04x}"
                where = f"line {line} of `{self.named}`" if line else f"`{self.named}`"
                raise self.error(
                    codes.ENCODING, f"{where} has {half} alone, half a character", "mend the text", line
                ) from error

    def _bad_json(self, line: int, error: Exception) -> UserError:
        what = (
            f"{error.msg} at column {error.colno}"
            if isinstance(error, json.JSONDecodeError)
            else "nested too deeply"
        )
        return self.error(
            codes.BROKEN_JSON, f"line {line} of `{self.named}` is not valid JSON: {what}", "mend that line", line
        )

    def _no_table(self, what: str, line: int | None = None) -> UserError:
        return self.error(
            codes.NOT_A_TABLE,
            f"`{self.named}` is not a table: {what}",
            'write [{"prompt": "…"}, …] in a .json file, or one object a line in a .jsonl file',
            line,
        )

    def _csv(self, separator: str) -> Rows:
        # A cell may hold a whole document; the reader's own limit of 128 KiB is one for the process.
        csv.field_size_limit(max(csv.field_size_limit(), 1 << 30))
        reader = csv.reader((line for _, line in self._lines()), delimiter=separator, strict=True)
        head: list[str] | None = None
        line = 1
        try:
            for cells in reader:
                if head is None:
                    head = cells
                    if len(head) == 1 and set(head[0]) & set(",;|\t"):
                        raise self.error(
                            codes.BROKEN_TABLE,
                            f"the head of `{self.named}` is one cell, `{head[0]}`",
                            "separate the cells of a .csv by commas, those of a .tsv by tabs",
                            1,
                        )
                    if len(set(head)) < len(head):
                        double = next(name for name in head if head.count(name) > 1)
                        raise self.error(
                            codes.BROKEN_TABLE,
                            f"the head of `{self.named}` has two columns `{double}`",
                            "rename one of them",
                            1,
                        )
                elif cells:
                    if len(cells) != len(head):
                        raise self.error(
                            codes.BROKEN_TABLE,
                            f"line {line} of `{self.named}` has {len(cells)} cells, its header has {len(head)}",
                            "put quotes around a cell that holds a separator or a line break",
                            line,
                        )
                    yield line, dict(zip(head, cells, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise self.error(
                codes.BROKEN_TABLE,
                f"line {line} of `{self.named}` is not valid csv: {error}",
                'close every quote, and write a quote inside a quoted cell as ""',
                line,
            ) from error

    def _parquet(self) -> Source:
        import pyarrow
        from pyarrow import parquet

        try:
            file = parquet.ParquetFile(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise self._broken_data("parquet file", error) from error

        def rows() -> Rows:
            number = 0
            try:
                for chunk in file.iter_batches(_CHUNK):
                    for row in chunk.to_pylist():
                        number += 1
                        yield number, row
            except (pyarrow.ArrowException, OSError) as error:
                raise self._broken_data("parquet file", error) from error

        return Source(self.address, self.named, tuple(file.schema_arrow.names), False, rows())

    def _saved(self) -> Source:
        """A directory that `save_to_disk` of `datasets` wrote."""
        if not any((self.path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            inside = sorted(p.name for p in self.path.iterdir() if p.name.endswith(SUFFIXES))
            raise self.error(
                codes.FILE_IS_DIRECTORY,
                f"`{self.named}` is a directory, and not one that `save_to_disk` of datasets wrote",
                f'name a file in it: from = "{self.named}/{inside[0]}"' if inside else "name a file",
            )
        import datasets

        try:
            data = datasets.load_from_disk(str(self.path))
        except Exception as error:  # a damaged directory surfaces as KeyError, ArrowInvalid and others
            raise self._broken_data("saved data set", error) from error
        if isinstance(data, datasets.DatasetDict):
            if self.entry["split"] not in data:
                raise self._no_split(list(data), f"write split = {json.dumps(next(iter(data), 'train'))}")
            data = data[self.entry["split"]]
        elif self.entry["split"] != "train":
            raise self._no_split(["train"], "it was saved as one split: leave `split` out")
        return _arrow(self.address, self.named, data)

    def _broken_data(self, what: str, error: Exception) -> UserError:
        return self.error(
            codes.BROKEN_TABLE,
            f"`{self.named}` is not a complete {what}: {first_line(error)}",
            "write or copy it again",
        )


def _hub(address: str, entry: Mapping[str, Any]) -> Source:
    import datasets

    name, subset, split = entry["from"]["hub"], entry["subset"], entry["split"]
    try:
        data = datasets.load_dataset(name, subset, split=split, revision=entry["from"].get("revision"))
    except Exception as error:  # what is wrong comes from datasets, huggingface_hub and the HTTP client alike
        raise _hub_error(address, name, f" (subset {subset or 'default'}, split {split})", error) from error
    return _arrow(address, name, data)


def pin_data(address: str, source: Mapping[str, Any]) -> dict[str, Any]:
    """The commit and the files of a data set of the hub (`pin_repo`). Raises UserError when it cannot be had."""
    from rlhfdsl.models.hub import pin_repo

    try:
        return pin_repo(source["hub"], "dataset", source.get("revision"))
    except Exception as error:  # network, authentication and missing repositories have no common base
        raise _hub_error(address, source["hub"], "", error) from error


def _hub_error(address: str, name: str, asked: str, error: Exception) -> UserError:
    at = f"{address}.from"
    if _unreachable(error):
        return UserError(
            codes.HUB_UNREACHABLE,
            f"`{name}` is not in the cache, and the Hugging Face hub cannot be reached",
            at=at,
            place=name,
            help="run `rlhf lock` once with a network (HF_HUB_OFFLINE unset), or save the data set with "
            'save_to_disk and name the directory: from = "./…"',
        )
    return UserError(
        codes.HUB_DATA,
        f"`{name}` cannot be read as it is asked for{asked}: {first_line(error)}",
        at=at,
        place=name,
        help="check name, subset, split and revision on the hub; a gated data set needs `hf auth login`",
    )


def _unreachable(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is one of the connection."""
    while error is not None:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & {"ConnectionError", "TransportError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
            return True
        error = error.__cause__ or error.__context__
    return False


def _arrow(address: str, name: str, data: Any) -> Source:
    """The rows of a `datasets.Dataset`."""

    def rows() -> Rows:
        number = 0
        for chunk in data.iter(_CHUNK):
            names = list(chunk)
            for cells in zip(*chunk.values(), strict=True):
                number += 1
                yield number, dict(zip(names, cells, strict=True))

    return Source(address, name, tuple(data.column_names), False, rows())


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def kind_of(value: Any) -> str:
    """A value's type in words, for a message."""
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    names |= {dict: "an object", bytes: "bytes"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
