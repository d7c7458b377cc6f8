"""The container of saved plans and bundles: a zip of which equal contents have equal bytes, and that is safe to open.

Entries are stored and not compressed, in one order, with one date and one mode; MANIFEST.json comes first and has the
size and sha256 of every other entry. A reader trusts nothing: it packs what it read again, and takes the archive only
if that gives the same bytes. So there are no links, no folders, no second entry of a name, no bytes in front, behind
or between, and no entry that unpacks to more than it takes.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhfdsl.language.diagnostics import UserError

FORMAT = 1
MANIFEST = "MANIFEST.json"
LARGEST = 2 << 30  # bytes of an archive that is opened
INFLATED = 4 << 30  # bytes that one .gz entry may hold
_ENTRIES = 20_000
_DATE = (1980, 1, 1, 0, 0, 0)
_MODE = (0o100644 << 16) | 0
# What recipes, data and models consist of. Nothing that Python, a shell or pickle would run.
_KINDS = re.compile(
    r"\.(rlhf|lock|json|jsonl|csv|tsv|txt|parquet|arrow|safetensors|jinja|model)$|\.(json|jsonl|csv|tsv)\.gz$"
)
_SEGMENT = re.compile(r"[^\x00-\x1f\x7f-\x9f\\/:*?\"<>|\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]{1,200}")
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Archive:
    """What an archive holds. about: what its maker says of it; entries: everything but the manifest, by name."""

    kind: str
    generator: str
    about: Mapping[str, Any]
    entries: Mapping[str, bytes]
    digest: str  # sha256 of the archive's bytes, in hex


def pack(kind: str, generator: str, about: Mapping[str, Any], entries: Mapping[str, bytes]) -> bytes:
    """The archive's bytes. Raises UserError for a name or a kind of file that no reader would take."""
    for name in entries:
        _check_name(name)
    files = {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in sorted(entries.items())}
    manifest = {"format": FORMAT, "kind": kind, "generator": generator, "about": about, "files": files}
    return _zip(_json(manifest), entries)


def unpack(data: bytes, name: str) -> Archive:
    """The archive with these bytes, verified. name: of the file, for messages. Raises UserError for any deviation."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found = {info.filename: _read(archive, info, name) for info in _infos(archive, name)}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise unusable(name, f"is cut short, damaged, or no file of rlhf ({error})") from error
    try:
        manifest = json.loads(found.pop(MANIFEST))
        kind, about, files = manifest["kind"], manifest["about"], manifest["files"]
        generator, version = str(manifest["generator"]), manifest["format"]
        expected = {str(entry): (pins["bytes"], pins["sha256"]) for entry, pins in files.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise unusable(name, "has no manifest that could be read") from error
    if version != FORMAT:
        raise unusable(name, f"has format {version}, and this program reads {FORMAT}; `{generator}` wrote it")
    for entry in sorted({*found, *expected}):
        if entry not in found or entry not in expected:
            raise changed(name, f"`{entry}` is {'missing' if entry in expected else 'not in the manifest'}")
        _check_name(entry, name)
        now = (len(found[entry]), _sha256(found[entry]))
        if now != expected[entry]:
            raise changed(name, f"`{entry}` is {expected[entry][1]} by the manifest, and {now[1]} here")
    folders = {entry[:cut].casefold() for entry in found for cut in range(len(entry)) if entry[cut] == "/"}
    if len({entry.casefold() for entry in found} - folders) < len(found):
        raise unusable(name, "is not safe to open: some systems take two of its names for one")
    if not isinstance(about, dict) or _zip(_json(manifest), found) != data:
        raise changed(name, "it is not byte for byte what rlhf writes")
    for entry, content in found.items():
        if entry.endswith(".gz"):
            _inflate(content, entry, name)
    return Archive(str(kind), generator, about, found, hashlib.sha256(data).hexdigest())


def unusable(name: str, why: str) -> UserError:
    return UserError("E0750", f"`{name}` {why}", place=name, help="fetch it again, or ask for it anew")


def changed(name: str, why: str) -> UserError:
    help = "fetch it again; if it is the same, someone changed it after it was made"
    return UserError("E0751", f"`{name}` was changed: {why}", place=name, help=help)


def _infos(archive: zipfile.ZipFile, name: str) -> list[zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > _ENTRIES:
        raise unusable(name, f"has {len(infos)} entries, and {_ENTRIES} is the most")
    if sum(info.file_size for info in infos) > LARGEST:
        raise unusable(name, f"says that it holds more than {LARGEST >> 30} GiB")
    return infos


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> bytes:
    # Before anything is read: a stored entry cannot grow.
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
        raise unusable(name, f"has a compressed or encrypted entry, `{shown(info.filename)}`")
    return archive.read(info)


def _check_name(entry: str, archive: str | None = None) -> None:
    """Refuse names that lead out of a folder, that another system reads otherwise, and kinds that no run reads."""
    good = all(
        _SEGMENT.fullmatch(part) and part.strip(" .") == part.rstrip(" .") != "" and not _DEVICES.match(part)
        for part in entry.split("/")
    )
    known = _KINDS.search(entry.lower()) is not None
    if good and known:
        return
    why = "is not a kind of file that a run reads" if good else "is a name that could lead elsewhere"
    if archive is not None:
        raise UserError(
            "E0750", f"`{archive}` is not safe to open: `{shown(entry)}` {why}", place=archive,
            help="do not use it; whoever made it did not use rlhf",
        )  # fmt: skip
    raise UserError("E0753", f"`{shown(entry)}` {why}, so it cannot be packed", help="rename it, or leave it out")


def shown(text: str) -> str:
    """A name with everything but plain characters escaped, and not too long, for a message."""
    return text.encode("unicode_escape").decode()[:120]


def _zip(manifest: bytes, entries: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in [(MANIFEST, manifest), *sorted(entries.items())]:
            info = zipfile.ZipInfo(name, _DATE)
            info.create_system, info.external_attr = 3, _MODE
            archive.writestr(info, data)
    return out.getvalue()


def _inflate(content: bytes, entry: str, name: str) -> None:
    """Refuse a .gz entry that unpacks to more than any data set that fits an archive."""
    unpacker = zlib.decompressobj(wbits=31)
    total, rest = 0, content
    try:
        while rest:
            total += len(unpacker.decompress(rest, 1 << 20))
            rest = unpacker.unconsumed_tail
            if unpacker.eof:
                rest, unpacker = unpacker.unused_data, zlib.decompressobj(wbits=31)
            if total > min(INFLATED, 200 * len(content) + (1 << 20)):
                raise unusable(name, f"is not safe to open: `{entry}` unpacks to more than 200 times its size")
    except zlib.error:
        return  # the reader of the data says what is wrong with it


def _json(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
