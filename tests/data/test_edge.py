"""An edge as a whole: rows as a sequence, and the facts that the lock keeps of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jsonschema
import pytest

from rlhfdsl.data.edge import Pair

HH = [
    {"chosen": f"\n\nHuman: q{i}\n\nAssistant: good", "rejected": f"\n\nHuman: q{i}\n\nAssistant: no"}
    for i in range(10)
]


def test_rows_are_a_sequence(folder):
    rows = folder.rows(HH, "preference", "preference", turns="hh")
    assert len(rows) == 10
    assert rows[-1] == rows[9]
    assert rows[2:4] == [rows[2], rows[3]]
    assert all(isinstance(row, Pair) for row in rows)
    with pytest.raises(IndexError):
        rows[10]


def test_rows_limits_a_source(folder):
    assert len(folder.rows(HH, "preference", "prompt", turns="hh", rows=4)) == 4


def test_prompts_carry_the_hash_of_their_turns(folder, say):
    from rlhfdsl.data.formats import key_of

    rows = folder.rows(HH, "preference", "prompt", turns="hh")
    assert rows[0].key == key_of([say.user("q0")])


def test_facts_by_hand(folder):
    """<bos>, "\\n\\nHuman: q0", "\\n\\nAssistant:" are 24 tokens; " good<eos>" and " no<eos>" 6 and 4."""
    path = folder.write("own.jsonl", [*HH, {"chosen": HH[0]["chosen"], "rejected": HH[0]["chosen"]}])
    folder.data("data.own", "own.jsonl", "preference", turns="hh")
    facts = folder.facts("data.own", "preference", length=29)
    assert facts.pop("content") == folder.facts("data.own", "preference", length=29)["content"]
    assert facts == {
        "rows": 11,
        "used": 10,
        "tokens": 10 * (29 + 28),
        "truncated": 10,
        "dropped": {"empty": 0, "too_long": 0, "tie": 1, "no_answer": 0},
        "sources": {"own.jsonl": {"rows": 11, "used": 10}},
        "lengths": {"max": 29, "mean": 28.5, "p50": 28, "p90": 29, "p99": 29},
        "sample": [
            {"text": "<bos>\n\nHuman: q0\n\nAssistant:", "loss": False},
            {"text": " good", "loss": True},
            {"text": " no<eos>", "loss": True},
        ],
        "files": {
            "own.jsonl": {
                "bytes": path.stat().st_size,
                "sha256": "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest(),
            }
        },
    }


def test_the_content_of_an_edge_is_its_tokens_masks_and_order(folder):
    path = folder.write("own.jsonl", HH)
    folder.data("data.own", "own.jsonl", "preference", turns="hh")
    first = folder.facts("data.own", "preference", length=29)["content"]
    assert first != folder.facts("data.own", "preference", length=28)["content"]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[1], lines[0], *lines[2:]]))
    assert first != folder.facts("data.own", "preference", length=29)["content"]
    path.write_text("\n".join(lines))  # other bytes, the same rows
    assert first == folder.facts("data.own", "preference", length=29)["content"]


def test_the_fingerprint_of_a_batch_is_its_rows(folder):
    folder.write("own.jsonl", HH)
    folder.data("data.own", "own.jsonl", "preference", turns="hh")
    rows, shorter = (folder.load("data.own", "preference", length=length) for length in (29, 28))
    again = folder.load("data.own", "preference", length=29)
    assert rows.fingerprint([0, 1]) == again.fingerprint([0, 1])
    others = {rows.fingerprint(chosen) for chosen in ([0, 1], [1, 0], [0], [0, 0])}
    assert len(others | {shorter.fingerprint([0, 1])}) == 5


def test_facts_of_a_blend_count_repeats(folder):
    folder.write("few.jsonl", [{"prompt": f"few{i}"} for i in range(2)])
    folder.write("many.jsonl", [{"prompt": f"many{i}"} for i in range(8)])
    folder.data("data.few", "few.jsonl", "prompt")
    folder.data("data.many", "many.jsonl", "prompt")
    folder.blend({"": {"data.few": 0.5, "data.many": 0.5}}, until="all")
    facts = folder.facts("blend.b", "prompt")
    assert (facts["rows"], facts["used"]) == (10, 16)
    assert facts["sources"] == {"few.jsonl": {"rows": 2, "used": 8}, "many.jsonl": {"rows": 8, "used": 8}}
    assert set(facts["files"]) == {"few.jsonl", "many.jsonl"}


def test_facts_fit_the_locks_schema_and_are_stable(folder):
    schema = json.loads((Path(__file__).parents[2] / "grammar" / "lock.schema.json").read_text())
    folder.write("own.jsonl", HH)
    folder.data("data.own", "own.jsonl", "preference", turns="hh")
    for read in ("preference", "chat", "prompt", "text"):
        facts = folder.facts("data.own", read)
        assert json.dumps(facts) == json.dumps(folder.facts("data.own", read))
        jsonschema.validate({"version": 1, "edges": {"sha256:" + "0" * 64: facts}, "models": {}}, schema)


def test_a_saved_directory_is_pinned_file_by_file(folder):
    import datasets

    datasets.Dataset.from_list([{"prompt": "q"}]).save_to_disk(str(folder.base / "saved"))
    folder.data("data.own", "saved", "prompt")
    files = folder.facts("data.own", "prompt")["files"]
    assert "saved/state.json" in files
    assert all((folder.base / name).stat().st_size == pins["bytes"] for name, pins in files.items())


def test_a_long_sample_is_shortened(folder):
    folder.data("data.own", "own.jsonl", "text")
    folder.write("own.jsonl", [{"text": "a" * 300 + "b" * 300}])
    (first, piece) = folder.facts("data.own", "text")["sample"]
    assert (first, piece["loss"]) == ({"text": "a", "loss": False}, True)
    assert piece["text"] == "a" * 200 + " … " + "b" * 195 + "<eos>"
