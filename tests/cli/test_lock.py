"""`rlhf.lock` as its user meets it: --locked, --frozen, --upgrade, and files that change."""

import hashlib
import json

import pytest
from command import rlhf

from recipes import small
from rlhfdsl.language.diagnostics import UserError
from rlhfdsl.running.inputs import verify_inputs


@pytest.fixture
def recipe(tmp_path):
    return small(tmp_path)


def digest(path):
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def test_locked_refuses_a_changed_file_with_both_hashes(capsys, recipe):
    pairs = recipe.parent / "pairs.jsonl"
    assert rlhf(capsys, "lock", recipe)[0] == 0
    assert rlhf(capsys, "plan", recipe, "--gpu", "cpu", "--locked")[0] == 0
    lock, before = (recipe.parent / "rlhf.lock").read_text(), digest(pairs)
    pairs.write_text(pairs.read_text().replace("No.", "Nay", 1))
    code, out, err = rlhf(capsys, "plan", recipe, "--gpu", "cpu", "--locked")
    assert (code, out) == (1, "") and "error[E0725]: `pairs.jsonl` changed since it was locked" in err
    assert before in err and digest(pairs) in err and "rlhf lock FILE" in err
    # --frozen looks at no file, and neither writes the lock.
    assert rlhf(capsys, "plan", recipe, "--gpu", "cpu", "--frozen")[0] == 0
    assert (recipe.parent / "rlhf.lock").read_text() == lock
    # Without a flag the file is read again, and that is said.
    code, _, err = rlhf(capsys, "plan", recipe, "--gpu", "cpu")
    assert code == 0 and "changed since it was locked" in err and "it is read again" in err
    assert rlhf(capsys, "plan", recipe, "--gpu", "cpu", "--locked")[0] == 0


@pytest.mark.parametrize("flag", ["--locked", "--frozen"])
def test_a_lock_that_lacks_something(capsys, recipe, flag):
    code, _, err = rlhf(capsys, "plan", recipe, "--gpu", "cpu", flag)
    assert code == 1 and "error[E0724]: rlhf.lock lacks model.tiny, stage.sft.train, stage.sft.eval" in err
    assert not (recipe.parent / "rlhf.lock").exists()


def test_a_lock_made_by_other_versions_is_told(capsys, recipe):
    assert rlhf(capsys, "lock", recipe)[0] == 0
    path = recipe.parent / "rlhf.lock"
    value = json.loads(path.read_text())
    assert value["code"]["packages"]["transformers"]
    value["code"]["packages"]["transformers"] = "4.0.0"
    path.write_text(json.dumps(value))
    code, out, err = rlhf(capsys, "plan", recipe, "--gpu", "cpu", "--locked")
    assert code == 0 and "made by other versions: transformers 4.0.0 then" in err
    assert "differs  transformers 4.0.0 then" in rlhf(capsys, "lock", recipe)[1]
    code, out, _ = rlhf(capsys, "lock", recipe, "--upgrade")
    assert code == 0 and out.startswith("made     model.tiny")
    assert rlhf(capsys, "plan", recipe, "--gpu", "cpu", "--locked")[2] == ""


def test_upgrade_beside_a_flag_that_forbids_it(capsys, recipe):
    code, _, err = rlhf(capsys, "lock", recipe, "--upgrade", "--locked")
    assert code == 2 and "--upgrade" in err


def test_a_run_refuses_what_changed_after_the_plan(capsys, recipe):
    saved = recipe.parent / "plan.json"
    assert rlhf(capsys, "plan", recipe, "--gpu", "cpu", "-o", saved)[0] == 0
    plan = json.loads(saved.read_text())
    (stage,) = plan["stages"]
    verify_inputs(plan, stage, recipe.parent)
    pairs = recipe.parent / "pairs.jsonl"
    before = digest(pairs)
    pairs.write_text(pairs.read_text().replace("No.", "Nay", 1))
    with pytest.raises(UserError) as error:
        verify_inputs(plan, stage, recipe.parent)
    assert error.value.code == "E0725" and before in error.value.message and digest(pairs) in error.value.message
    pairs.unlink()
    with pytest.raises(UserError, match="is gone"):
        verify_inputs(plan, stage, recipe.parent)


def test_rows_that_come_out_otherwise_are_refused(capsys, recipe):
    """The files are the same, and a library renders them in another way."""
    from rlhfdsl.data.edge import load_edge
    from rlhfdsl.models.tokenizers import load_tokenizer

    saved = recipe.parent / "plan.json"
    assert rlhf(capsys, "plan", recipe, "--gpu", "cpu", "-o", saved)[0] == 0
    plan = json.loads(saved.read_text())
    edge = plan["stages"][0]["edges"]["train"]
    tokenizer = load_tokenizer(plan["models"]["model.tiny"], recipe.parent)
    rows = load_edge(plan, edge, recipe.parent, tokenizer)
    assert rows.content == edge["facts"]["content"]
    tokenizer.chat_template = tokenizer.chat_template.replace("Human", "Person")
    with pytest.raises(UserError) as error:
        load_edge(plan, edge, recipe.parent, tokenizer)
    assert error.value.code == "E0726" and rows.content in error.value.message
    with (recipe.parent / "pairs.jsonl").open("a") as file:  # after the files were compared and before they were read
        file.write('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(UserError) as error:
        load_edge(plan, edge, recipe.parent, tokenizer)
    assert error.value.code == "E0725" and "`pairs.jsonl` changed since it was locked" in error.value.message
