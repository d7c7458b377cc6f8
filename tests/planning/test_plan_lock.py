"""The lock file: canonical, refused when it is none, stale when a file changed."""

import hashlib
import json

import pytest
from workshop import PIPELINE, edge_facts

from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.planning import lock
from rlhfdsl.planning.validate import validate_lock


def test_round_trip_is_canonical(tmp_path):
    key = lock.key_of({"b": 1, "a": "ü"})
    assert key == lock.key_of({"a": "ü", "b": 1}) and key.startswith("sha256:")
    value = {"version": 1, "models": {}, "edges": {key: edge_facts(7)}}
    path = tmp_path / lock.NAME
    lock.write(path, value)
    assert lock.read(path) == value
    text = path.read_text(encoding="utf-8")
    assert text.endswith("}\n") and text.index('"edges"') < text.index('"models"') < text.index('"version"')
    assert [p.name for p in tmp_path.iterdir()] == [lock.NAME]  # no scratch file stays
    validate_lock(value)


def test_no_file_is_an_empty_lock(tmp_path):
    assert lock.read(tmp_path / "none") == lock.empty()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "has version None"),
        ('{"version": 2, "edges": {}, "models": {}}', "has version 2, and this program reads version 1"),
        ('{"version": 1}', "lacks `edges` or `models`"),
    ],
)
def test_unusable(tmp_path, text, message):
    path = tmp_path / lock.NAME
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        lock.read(path)
    assert error.value.code == "E0720"


HELLO = {"bytes": 5, "sha256": "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"}


def test_changes(tmp_path):
    file = tmp_path / "data" / "a.jsonl"
    file.parent.mkdir()
    file.write_bytes(b"hello")
    facts = edge_facts(1) | {"files": {"data/a.jsonl": HELLO}}
    assert lock.changes(facts, tmp_path) == []
    file.write_bytes(b"hullo")
    (change,) = lock.changes(facts, tmp_path)
    # both hashes, in full
    assert str(change) == (
        f"`data/a.jsonl` changed since it was locked: 5 bytes, {HELLO['sha256']} then, 5 bytes, "
        f"sha256:{hashlib.sha256(b'hullo').hexdigest()} now"
    )
    file.unlink()
    (change,) = lock.changes(facts, tmp_path)
    assert str(change).startswith("`data/a.jsonl` is gone since it was locked (5 bytes, sha256:2cf2")


def test_a_plan_reads_the_ends_of_a_large_file_and_a_run_all_of_it(tmp_path):
    """A plan looks at every pin, and the weights of a 13B model take half a minute to hash."""
    file = tmp_path / "model.safetensors"
    with file.open("wb") as out:
        out.write(b"header")
        out.truncate(lock.WHOLE + 1)
    pinned = lock.pin(file)
    assert pinned["bytes"] == lock.WHOLE + 1 and set(pinned) == {"bytes", "sha256", "ends"}
    facts = {"files": {file.name: pinned}}
    assert lock.changes(facts, tmp_path) == lock.changes(facts, tmp_path, whole=True) == []
    with file.open("r+b") as out:
        out.seek(lock.WHOLE // 2)
        out.write(b"other weights")
    assert lock.changes(facts, tmp_path) == []
    seen = {}
    lock.changes(facts, tmp_path, seen)
    (change,) = lock.changes(facts, tmp_path, seen, whole=True)
    assert change.name == file.name and pinned["sha256"] in str(change)
    with file.open("r+b") as out:
        out.write(b"HEADER")
    (change,) = lock.changes(facts, tmp_path)
    assert "of its ends" in str(change)


def test_facts_of_another_semantics_are_none(tmp_path):
    path = tmp_path / lock.NAME
    value = lock.empty() | {"edges": {"sha256:" + "0" * 64: edge_facts(1)}}
    lock.stamp(value)
    validate_lock(value)
    lock.write(path, value)
    assert lock.read(path)["edges"] and lock.made_here(value) == []
    value["code"]["semantics"] += 1
    value["code"]["packages"]["torch"] = "1.0"
    lock.write(path, value)
    assert lock.read(path)["edges"] == {}
    other = lock.made_here(value)
    assert other[0].startswith("semantics 2 then") and other[1].startswith("torch 1.0 then")


def test_a_source_is_held_to_its_locked_commit():
    facts = {"hub": {"org/m": {"revision": "c" * 40, "files": {}}}}
    assert lock.pinned({"hub": "org/m", "revision": "main"}, facts) == {"hub": "org/m", "revision": "c" * 40}
    assert lock.pinned({"hub": "org/n", "revision": None}, facts) == {"hub": "org/n", "revision": None}
    assert lock.pinned({"path": "m"}, None) == {"path": "m"}


def test_missing_and_drop_stale(shop):
    found = lock.missing(shop.plan(PIPELINE))
    # the ppo stage has no eval; sft and reward read different things from the same part
    assert [address for _, address, _ in found] == [
        "model.tiny",
        "stage.sft.train", "stage.sft.eval", "stage.reward.train", "stage.reward.eval", "stage.ppo.train",
    ]  # fmt: skip
    shop.know(PIPELINE, 100)
    plan = shop.plan(PIPELINE)
    assert lock.missing(plan) == []
    gone = {"files": {"pairs.jsonl": {"bytes": 1, "sha256": "sha256:00"}}}
    shop.lock["edges"][found[1][2]["key"]] |= gone
    assert [c.name for c in lock.drop_stale(shop.lock, shop.plan(PIPELINE), shop.folder)] == ["pairs.jsonl"]
    assert [address for _, address, _ in lock.missing(shop.plan(PIPELINE))] == ["stage.sft.train"]


def test_equal_inputs_are_listed_once(shop):
    text = (
        PIPELINE
        + "stage sft twin { model = model.tiny, data = blend.chat.sft, batch = 8, length = 128, lr = 1e-3 }\n"
    )
    found = lock.missing(shop.plan(text))
    assert len(found) == 6
    json.dumps(found)
