"""Columns, cells and turns: from rows as they are written to prompts and answers."""

from __future__ import annotations

import pytest

from rlhfdsl.data.formats import key_of, parse, split_turns
from rlhfdsl.data.sources import open_source
from rlhfdsl.language.diagnostics import UserError


def parsed(folder, rows, format, name="own.jsonl", **entry):
    folder.write(name, rows)
    folder.data("data.own", name, format, **entry)
    entry = folder.plan["data"]["data.own"]
    return list(parse(open_source("data.own", entry, folder.base), entry))


def refused(folder, rows, format, name="own.jsonl", **entry):
    with pytest.raises(UserError) as caught:
        parsed(folder, rows, format, name, **entry)
    assert caught.value.help and caught.value.place
    return caught.value


def test_hh_turns():
    text = "\n\nHuman: What is\n\nthe sky?\n\nAssistant: Blue. Human: no\n\nHuman:  Why? \n\nAssistant:"
    assert split_turns(text) == [
        {"role": "user", "content": "What is\n\nthe sky?"},
        {"role": "assistant", "content": "Blue. Human: no"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": ""},
    ]


def test_hh_turns_of_one_speaker_become_one():
    text = "Human: a\n\nHuman: b\n\nAssistant:\n\nAssistant: c"
    assert split_turns(text) == [
        {"role": "user", "content": "a\n\nb"},
        {"role": "assistant", "content": "c"},
    ]


def test_text_without_hh_turns_is_none():
    assert split_turns("What is the sky?") is None
    assert split_turns("Once upon a time\n\nHuman: hi") is None
    assert split_turns("") is None


def test_a_pair_in_every_notation_is_the_same_row(folder, say):
    """As text, as messages, as whole conversations, and in hh turns with and without a prompt."""
    talk = [say.user("q"), say.bot("a"), say.user("r")]
    hh = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
    rows = [
        ([{"prompt": talk, "chosen": "good", "rejected": "bad"}], "none"),
        ([{"prompt": talk, "chosen": [say.bot("good")], "rejected": [say.bot("bad")]}], "none"),
        ([{"prompt": talk, "chosen": [*talk, say.bot("good")], "rejected": [*talk, say.bot("bad")]}], "none"),
        ([{"chosen": [*talk, say.bot("good")], "rejected": [*talk, say.bot("bad")]}], "none"),
        ([{"prompt": hh, "chosen": " good", "rejected": " bad"}], "hh"),
        ([{"prompt": hh, "chosen": hh + " good", "rejected": hh + " bad"}], "hh"),
        ([{"prompt": hh, "chosen": "\n\nAssistant: good", "rejected": "\n\nAssistant: bad"}], "hh"),
        ([{"chosen": hh + " good", "rejected": hh + " bad"}], "hh"),
    ]
    for written, turns in rows:
        (row,) = parsed(folder, written, "preference", turns=turns)
        assert (row.prompt, row.chosen, row.rejected) == (tuple(talk), "good", "bad"), written
        assert row.key == key_of(talk)


def test_text_is_one_turn_of_the_user(folder, say):
    (row,) = parsed(folder, [{"prompt": "Human: q", "chosen": "a", "rejected": "b"}], "preference")
    assert row.prompt == (say.user("Human: q"),)


def test_dialogues_that_fork_early_answer_where_they_fork(folder):
    head = "\n\nHuman: q\n\nAssistant:"
    rows = [{"chosen": f"{head} a\n\nHuman: r\n\nAssistant: b", "rejected": f"{head} c"}]
    (row,) = parsed(folder, rows, "preference", turns="hh")
    assert (len(row.prompt), row.chosen, row.rejected) == (1, "a", "c")


def test_dialogues_that_differ_in_the_users_words_are_no_pair(folder):
    rows = [{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: r\n\nAssistant: b"}]
    (row,) = parsed(folder, rows, "preference", turns="hh")
    assert row.prompt == ()  # which is dropped as empty
    head = "\n\nHuman: q\n\nAssistant: a\n\nHuman:"
    rows = [{"chosen": f"{head} r\n\nAssistant: b", "rejected": f"{head} s\n\nAssistant: c"}]
    (row,) = parsed(folder, rows, "preference", turns="hh")
    assert row.chosen == row.rejected == "a"  # which is dropped as a tie


def test_chat_reads_up_to_its_last_answer(folder, say):
    talk = [say.system("s"), say.user("q"), say.bot("a"), say.user("r")]
    (row,) = parsed(folder, [{"messages": talk}], "chat")
    assert (row.prompt, row.chosen) == (tuple(talk[:2]), "a")
    (row,) = parsed(folder, [{"messages": talk[:2]}], "chat")
    assert (row.prompt, row.chosen) == (tuple(talk[:2]), None)


def test_other_spellings_of_messages(folder, say):
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "q"}], "name": None}, say.bot("a")]
    for messages in (talk, parts):
        (row,) = parsed(folder, [{"messages": messages}], "chat")
        assert (row.prompt, row.chosen) == ((say.user("q"),), "a")


def test_columns_may_have_other_names(folder, say):
    rows = [{"question": "q", "good": "a", "bad": "b"}]
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    (row,) = parsed(folder, rows, "preference", columns=columns)
    assert (row.prompt, row.chosen, row.rejected) == ((say.user("q"),), "a", "b")


def test_a_key_ignores_blanks_and_notation_and_nothing_else(say):
    assert key_of([say.user(" q\n")]) == key_of([say.user("q")])
    others = [
        [say.user("Q")],
        [say.bot("q")],
        [say.system("s"), say.user("q")],
        [say.user("q"), say.user("")],
    ]
    assert len({key_of(other) for other in ([say.user("q")], *others)}) == 5


GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}
TALK = [{"role": "user", "content": "q"}]
BAD_ROWS = [
    # name, format, turns, second row, code, at, part of the message, part of the help
    (
        "null",
        "preference",
        "none",
        GOOD | {"chosen": None},
        "E0811",
        "from",
        "`chosen` is null",
        "leave the row out",
    ),
    (
        "absent",
        "preference",
        "none",
        {"prompt": "q", "chosen": "a"},
        "E0811",
        "from",
        "`rejected` is missing",
        "fill",
    ),
    (
        "number",
        "preference",
        "none",
        GOOD | {"chosen": 3},
        "E0811",
        "from",
        "`chosen` is a number",
        "in quotes",
    ),
    ("switch", "prompt", "none", {"prompt": True}, "E0811", "from", "`prompt` is true or false", "in quotes"),
    (
        "object",
        "prompt",
        "none",
        {"prompt": {"a": 1}},
        "E0811",
        "from",
        "is an object, not text or messages",
        "make",
    ),
    ("text", "text", "none", {"text": ["a"]}, "E0811", "from", "`text` is a list, not text", "make it text"),
    (
        "item",
        "prompt",
        "none",
        {"prompt": ["q"]},
        "E0812",
        "from",
        "item 1 of `prompt` is text",
        '"role": "user"',
    ),
    (
        "keys",
        "prompt",
        "none",
        {"prompt": [{"role": "user"}]},
        "E0812",
        "from",
        "without role and content",
        "role",
    ),
    (
        "role",
        "prompt",
        "none",
        {"prompt": [{"role": "tool", "content": "q"}]},
        "E0812",
        "from",
        'message 1 of `prompt` has the role "tool"',
        "leave out rows with other turns, such as a tool's",
    ),
    (
        "content",
        "prompt",
        "none",
        {"prompt": [{"role": "user", "content": None}]},
        "E0812",
        "from",
        "the content of message 1 of `prompt` is null",
        "leave out rows in which a tool is called",
    ),
    (
        "image",
        "prompt",
        "none",
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        "E0812",
        "from",
        "is a list, not text",
        "text",
    ),
    (
        "answer",
        "preference",
        "none",
        GOOD | {"chosen": TALK},
        "E0812",
        "from",
        "neither begins with the prompt",
        "alone",
    ),
    (
        "hh",
        "prompt",
        "hh",
        {"prompt": "hello"},
        "E0813",
        "turns",
        'does not begin with a turn "\\n\\nHuman:"',
        "turns",
    ),
    (
        "chat",
        "chat",
        "none",
        {"messages": "\n\nHuman: q"},
        "E0811",
        "format",
        "is text, not messages",
        "turns = hh",
    ),
]
FIRST = {
    "preference": GOOD,
    "prompt": {"prompt": TALK},
    "text": {"text": "t"},
    "chat": {"messages": TALK},
}


@pytest.mark.parametrize(
    ("format", "turns", "row", "code", "at", "message", "help"),
    [bad[1:] for bad in BAD_ROWS],
    ids=[bad[0] for bad in BAD_ROWS],
)
def test_a_bad_cell_is_one_error_with_its_line(folder, format, turns, row, code, at, message, help):
    error = refused(folder, [FIRST[format], row], format, turns=turns)
    assert (error.code, error.place, error.at) == (code, "own.jsonl:2", f"data.own.{at}")
    assert message in error.message
    assert help in error.help


def test_a_prompt_in_some_rows_only(folder, say):
    whole = {"chosen": [*TALK, say.bot("a")], "rejected": [*TALK, say.bot("b")]}
    error = refused(folder, [whole, whole | {"prompt": "q"}], "preference")
    assert (error.code, error.place) == ("E0811", "own.jsonl:2")


def test_text_pairs_without_a_prompt(folder):
    error = refused(folder, [{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "b"}], "preference")
    assert (error.code, error.at) == ("E0814", "data.own.format")
    assert "turns = hh" in error.help
    error = refused(folder, [{"chosen": "a", "rejected": "b"}], "preference")
    assert 'columns { prompt = "…" }' in error.help
    error = refused(folder, [{"chosen": "a", "rejected": "b", "title": "q"}], "preference")
    assert 'columns { prompt = "title" }' in error.help


@pytest.mark.parametrize(
    ("format", "row", "help"),
    [
        ("prompt", {"question": "q"}, 'columns { prompt = "question" }'),
        (
            "preference",
            {"prompt": "q", "Chosen": "a", "worse": "b"},
            'chosen = "Chosen", rejected = "worse" }',
        ),
        ("chat", {"conversations": TALK}, 'columns { messages = "conversations" }'),
        ("text", {"x": "q"}, 'columns { text = "…" }'),
        ("preference", {"chosen_response": "a", "rejected": "b"}, 'columns { chosen = "chosen_response" }'),
    ],
)
def test_a_missing_column_suggests_one(folder, format, row, help):
    error = refused(folder, [row], format)
    assert (error.code, error.place, error.at) == ("E0810", "own.jsonl", "data.own.format")
    assert help in error.help
    assert all(f"`{column}`" in error.message for column in row)


def test_columns_that_name_nothing(folder):
    error = refused(folder, [GOOD], "preference", columns={"prompt": "question"})
    assert (error.code, error.at) == ("E0810", "data.own.columns.prompt")
    error = refused(folder, [GOOD], "preference", columns={"promt": "prompt"})
    assert (error.code, error.at) == ("E0810", "data.own.columns.promt")
    assert error.message == "the format preference has no `promt`"
