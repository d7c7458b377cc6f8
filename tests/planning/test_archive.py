"""The container: equal bytes for equal contents, and everything that a hostile archive could try is refused."""

import gzip
import hashlib
import io
import json
import random
import stat
import struct
import zipfile
import zlib

import pytest

from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.planning import archive

ENTRIES = {"plan.json": b"{}\n", "files/a.rlhf": b'recipe "a" { }\n', "files/data/rows.jsonl": b'{"text": "x"}\n'}


def packed(entries=ENTRIES):
    return archive.pack("bundle", "rlhfdsl 0", {"n": 1}, entries)


def forged(entries, *, extra=(), comment=b"", compression=zipfile.ZIP_STORED, before=b"", mode=0o100644):
    """An archive with a manifest that fits `entries`, as an attacker would write it; `extra` stand not in it."""
    files = {
        name: {"bytes": len(data), "sha256": "sha256:" + hashlib.sha256(data).hexdigest()}
        for name, data in sorted(entries.items())
    }
    manifest = {"format": 1, "kind": "bundle", "generator": "rlhfdsl 0", "about": {"n": 1}, "files": files}
    text = json.dumps(manifest, sort_keys=True, indent=1) + "\n"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as zipped:
        zipped.comment = comment
        for name, data in [("MANIFEST.json", text.encode()), *sorted(entries.items()), *extra]:
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr, info.compress_type = 3, mode << 16, compression
            zipped.writestr(info, data)
    return before + out.getvalue()


def refused(data, code=("E0750", "E0751")):
    with pytest.raises(UserError) as error:
        archive.unpack(data, "x.rlhfb")
    assert error.value.code in code and "x.rlhfb" in str(error.value.message)
    assert error.value.message.isprintable(), "nothing of it reaches the terminal raw"
    return error.value.message


def test_equal_contents_have_equal_bytes():
    data = packed()
    assert data == packed(dict(reversed(ENTRIES.items()))) == forged(ENTRIES)
    held = archive.unpack(data, "x.rlhfb")
    assert (held.kind, held.generator, held.about, held.entries) == ("bundle", "rlhfdsl 0", {"n": 1}, ENTRIES)
    assert held.digest == hashlib.sha256(data).hexdigest()
    # Fixed: another Python or platform must not write it otherwise.
    assert held.digest == GOLDEN


GOLDEN = "734d4454f6c3f2bb1558bcbbe74570054d8569de58a92b18092677fd31147a25"


@pytest.mark.parametrize(
    "name",
    [
        "../a.json", "files/../../a.json", "/etc/a.json", "//host/a.json", "C:/a.json", "c:a.json", "files\\..\\a.json",
        "~/../a.json", "./a.json", "files//a.json", "files/./a.json", "files/a.json/", "a.json ", ".. /a.json",
        "files/con.json", "NUL.json", "files/lpt1.txt", "a\x00.json", "a\n.json", "\x1b[31ma.json", "a\u202ejson.rlhf",
        "\u200ba.json", "x" * 201 + ".json", "a.json:stream", "files/.../a.json", "a*.json",
    ],
)  # fmt: skip
def test_no_name_leads_elsewhere(name):
    refused(forged({**ENTRIES, name: b"{}"}))
    with pytest.raises(UserError) as error:
        packed({name: b"{}"})
    assert error.value.code == "E0753" and error.value.message.isprintable()


@pytest.mark.parametrize(
    "name",
    [
        "files/train.py", "files/weights.bin", "files/model.pt", "files/model.pth", "files/a.pkl", "files/a.pickle",
        "files/a.npy", "files/a.so", "files/run.sh", "files/a.ckpt", "files/a", "files/.bashrc", "files/a.pth.json.exe",
        "files/sitecustomize.pyc", "files/a.zip", "files/a.tar.gz", "files/a.gguf", "files/a.h5", "files/conf.yaml",
    ],
)  # fmt: skip
def test_no_code_and_no_pickle(name):
    assert "not safe to open" in refused(forged({**ENTRIES, name: b"x"}))


def test_no_links_folders_or_devices():
    for kind in (stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFCHR):
        refused(forged(ENTRIES, mode=kind | 0o777))
    refused(forged(ENTRIES, mode=0o100755))
    refused(forged({**ENTRIES, "files/dir/": b""}))


def test_no_bombs():
    zeros = {"files/a.jsonl": b"\0" * (1 << 20)}
    assert "compressed" in refused(forged(zeros, compression=zipfile.ZIP_DEFLATED))
    refused(forged(zeros, compression=zipfile.ZIP_BZIP2))
    refused(forged(zeros, compression=zipfile.ZIP_LZMA))
    bomb = gzip.compress(b"\0" * (64 << 20), mtime=0)
    assert "unpacks to more than" in refused(forged({**ENTRIES, "files/a.jsonl.gz": bomb}))
    in_parts = gzip.compress(b"\0" * (3 << 20), mtime=0) * 40
    assert "unpacks to more than" in refused(forged({**ENTRIES, "files/a.jsonl.gz": in_parts}))
    honest = gzip.compress(b'{"text": "a"}\n' * 50, mtime=0)
    archive.unpack(packed({**ENTRIES, "files/a.jsonl.gz": honest}), "x.rlhfb")


def test_overlapping_entries_and_lying_sizes():
    data = bytearray(packed())
    central = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", central + 4)
    # The second entry of the directory points at the first's data.
    data[second + 42 : second + 46] = struct.pack("<I", 0)
    refused(bytes(data))
    for size in (0, 1, 0xFFFFFFF0):
        data = bytearray(packed())
        data[second + 20 : second + 28] = struct.pack("<II", size, size)
        refused(bytes(data))


def test_nothing_before_behind_between_or_twice():
    data = packed()
    refused(b"#!/bin/sh\nexit\n" + data)
    refused(data + b"more")
    refused(forged(ENTRIES, comment=b"hello"))
    with pytest.warns(UserWarning):
        refused(forged(ENTRIES, extra=[("plan.json", b"{}\n")]))
    assert "not in the manifest" in refused(forged(ENTRIES, extra=[("files/b.json", b"{}")]))
    refused(forged({**ENTRIES, "FILES/a.rlhf": b"x"}))
    refused(forged({**ENTRIES, "files/A.rlhf": b"x"}))
    refused(forged({**ENTRIES, "plan.json/a.json": b"x"}))
    with pytest.warns(UserWarning):
        refused(forged(ENTRIES, extra=[("MANIFEST.json", b"{}")]))


def test_a_changed_entry_is_named_with_both_hashes():
    changed = {**ENTRIES, "plan.json": b"[]\n"}
    data = forged(ENTRIES).replace(b"{}\n", b"[]\n")  # the manifest's "about" has no such bytes
    crc = struct.pack("<I", zlib.crc32(b"[]\n"))
    data = data.replace(struct.pack("<I", zlib.crc32(b"{}\n")), crc)
    message = refused(data, ("E0751",))
    for entries in (ENTRIES, changed):
        assert hashlib.sha256(entries["plan.json"]).hexdigest() in message
    assert "`plan.json`" in message


@pytest.mark.parametrize(
    "manifest", [b"", b"[]", b"{", b"null", b'{"format": 1}', b'{"format": 1, "kind": 1, "files": []}', b"[" * 100_000]
)
def test_a_manifest_that_is_none(manifest):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as zipped:
        zipped.writestr("MANIFEST.json", manifest)
    refused(out.getvalue())


def test_another_format_is_told():
    data = forged(ENTRIES)
    old, new = b'"format": 1', b'"format": 2'
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as zipped, zipfile.ZipFile(out, "w") as other:
        for info in zipped.infolist():
            other.writestr(info, zipped.read(info).replace(old, new))
    assert "has format 2, and this program reads 1" in refused(out.getvalue())


def test_cut_and_flipped_bytes_never_pass():
    """Every truncation and 300 flips at random places: a diagnostic each time, and never another exception."""
    data = packed()
    for end in range(0, len(data), 7):
        refused(data[:end])
    places = random.Random(1)
    for _ in range(300):
        broken = bytearray(data)
        broken[places.randrange(len(broken))] ^= 1 << places.randrange(8)
        refused(bytes(broken))
