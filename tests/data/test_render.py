"""Token ids and loss flags, against what the templates write, spelled out by hand."""

from __future__ import annotations

import pytest

from rlhfdsl.data.edge import Example
from rlhfdsl.data.facts import facts_of
from rlhfdsl.language.diagnostics import UserError

BOS, EOS = 257, 258
START, END = 256, 257  # of the ChatML tokenizer


def ids_of(*pieces):
    """Ids of the byte tokenizer: bytes of text, and ids as they are."""
    return [i for piece in pieces for i in (piece.encode() if isinstance(piece, str) else [piece])]


def example(*pieces):
    """An Example from pieces, learned where a piece stands in a list: example("no", ["yes", EOS])."""
    ids, loss = [], []
    for piece in pieces:
        part = ids_of(*(piece if isinstance(piece, list) else [piece]))
        ids += part
        loss += [isinstance(piece, list)] * len(part)
    return Example(ids, loss)


def test_a_chat_learns_every_answer_with_its_end(folder, say):
    talk = [say.system("s"), say.user("q"), say.bot("a"), say.user("r"), say.bot("bc")]
    rows = folder.rows([{"messages": talk}], "chat", "chat")
    assert rows[0] == example(
        BOS, "s\n\nHuman: q\n\nAssistant:", [" a", EOS], "\n\nHuman: r\n\nAssistant:", [" bc", EOS]
    )


def test_what_follows_the_last_answer_is_not_read(folder, say):
    rows = folder.rows([{"messages": [say.user("q"), say.bot("a"), say.user("r")]}], "chat", "chat")
    assert rows[0] == example(BOS, "\n\nHuman: q\n\nAssistant:", [" a", EOS])


def test_an_answer_that_opens_a_chat_is_context(folder, say):
    rows = folder.rows([{"messages": [say.bot("hi"), say.user("q"), say.bot("a")]}], "chat", "chat")
    assert rows[0] == example(BOS, "\n\nAssistant: hi", EOS, "\n\nHuman: q\n\nAssistant:", [" a", EOS])


def test_a_pair_read_as_chat_learns_the_chosen_answer_only(folder, say):
    pair = {"prompt": [say.user("q"), say.bot("a"), say.user("r")], "chosen": "b", "rejected": "c"}
    rows = folder.rows([pair], "preference", "chat")
    prompt = (BOS, "\n\nHuman: q\n\nAssistant: a", EOS, "\n\nHuman: r\n\nAssistant:")
    assert rows[0] == example(*prompt, [" b", EOS])
    rows = folder.load("data.own", "preference")
    assert rows[0].chosen == example(*prompt, [" b", EOS])
    assert rows[0].rejected == example(*prompt, [" c", EOS])
    rows = folder.load("data.own", "prompt")
    assert rows[0].ids == ids_of(*prompt)
    assert rows[0].text == "<bos>\n\nHuman: q\n\nAssistant: a<eos>\n\nHuman: r\n\nAssistant:"


def test_loss_all_learns_everything_but_the_first_token(folder, say):
    rows = folder.rows([{"messages": [say.user("q"), say.bot("a")]}], "chat", "chat", loss="all")
    assert rows[0] == example(BOS, ["\n\nHuman: q\n\nAssistant: a", EOS])


def test_text_is_learned_whole_and_closed(folder):
    rows = folder.rows([{"text": "abc"}, {"text": " \n"}], "text", "text")
    assert list(rows) == [example("a", ["bc", EOS])]
    assert facts_of(rows)["dropped"]["empty"] == 1
    assert list(folder.load("data.own", "text", length=2)) == [example("a", ["b"])]
    assert list(folder.load("data.own", "chat", loss="all")) == [example("a", ["bc", EOS])]
    with pytest.raises(UserError, match="E0630.*not read as chat") as caught:
        folder.load("data.own", "chat", loss="answer")
    assert caught.value.at == "data.own.format"


def test_prompts_cannot_be_read_as_pairs(folder):
    with pytest.raises(UserError, match="E0630") as caught:
        folder.rows([{"prompt": "q"}], "prompt", "preference")
    assert "preference" in caught.value.help


def test_an_answer_is_cut_to_the_length(folder):
    """<bos> and "\\n\\nHuman: q\\n\\nAssistant:" are 1 + 10 + 12 = 23 tokens: 25 leave two of an answer."""
    pair = {"prompt": "q", "chosen": "bcd", "rejected": "x"}
    rows = folder.rows([pair], "preference", "preference", length=25)
    assert rows[0].chosen == example(BOS, "\n\nHuman: q\n\nAssistant:", [" b"])
    assert rows[0].rejected == example(BOS, "\n\nHuman: q\n\nAssistant:", [" x"])
    assert (facts_of(rows)["truncated"], facts_of(rows)["lengths"]["max"]) == (1, 25)
    assert facts_of(folder.load("data.own", "chat", length=27))["truncated"] == 1
    assert facts_of(folder.load("data.own", "chat", length=28))["truncated"] == 0
    with pytest.raises(UserError, match=r"E0632.*1 no answer") as caught:
        folder.load("data.own", "chat", length=23)
    assert caught.value.help == "raise `length` from 23 tokens, or give the rows an answer"
    with pytest.raises(UserError, match=r"E0632.*1 too long"):
        folder.load("data.own", "preference", length=26, overlong="drop")


def test_answers_that_the_cut_makes_equal_are_a_tie(folder):
    pair = {"prompt": "q", "chosen": "bcd", "rejected": "bce"}
    with pytest.raises(UserError, match=r"E0632.*1 tie"):
        folder.rows([pair], "preference", "preference", length=26)
    assert len(folder.load("data.own", "preference", length=27)) == 1


def test_a_long_prompt_is_dropped_or_keeps_its_end(folder):
    rows = [{"prompt": "q"}, {"prompt": "qq"}]
    kept = folder.rows(rows, "prompt", "prompt", length=23)
    assert [row.ids for row in kept] == [ids_of(BOS, "\n\nHuman: q\n\nAssistant:")]
    assert facts_of(kept)["dropped"] == {"empty": 0, "too_long": 1, "tie": 0, "no_answer": 0}
    both = folder.load("data.own", "prompt", length=23, overlong="cut")
    assert both[1].ids == ids_of("\n\nHuman: qq\n\nAssistant:")[-23:]
    assert (facts_of(both)["truncated"], facts_of(both)["dropped"]["too_long"]) == (1, 0)
    with pytest.raises(UserError, match=r"E0632.*2 too long") as caught:
        folder.load("data.own", "prompt", length=22)
    assert caught.value.help == "raise `rollout.prompt` from 22 tokens, or cut them: `overlong = cut`"


def test_rows_that_say_nothing_are_dropped_and_counted(folder, say):
    pairs = [
        {"prompt": " ", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": " \n"},
        {"prompt": "q", "chosen": "a", "rejected": " a"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ]
    rows = folder.rows(pairs, "preference", "preference")
    assert facts_of(rows)["dropped"] == {"empty": 3, "too_long": 0, "tie": 1, "no_answer": 0}
    assert (facts_of(rows)["rows"], facts_of(rows)["used"]) == (5, 1)
    # Read as chat, the rejected answer does not matter; read as prompts, no answer does.
    assert len(folder.load("data.own", "chat")) == 3
    assert len(folder.load("data.own", "prompt")) == 4
    talks = [[say.user("q")], [say.system("s"), say.bot("a")], [say.user("q"), say.bot("a")]]
    rows = folder.rows([{"messages": talk} for talk in talks], "chat", "chat")
    assert facts_of(rows)["dropped"] == {"empty": 1, "too_long": 0, "tie": 0, "no_answer": 1}


def test_pad_that_is_eos_hides_nothing(folder, say):
    folder.chatml()
    talk = [say.user("q"), say.bot("a"), say.user("r"), say.bot("b")]
    rows = folder.rows([{"messages": talk}], "chat", "chat", model="model.chat")
    assert rows[0] == example(
        START, "user\nq", END, "\n", START, "assistant\n", ["a", END], "\n",
        START, "user\nr", END, "\n", START, "assistant\n", ["b", END],
    )  # fmt: skip


def test_tokenizers_without_bos_or_eos(folder, say):
    """Without EOS nothing ends an answer, unless the generation config says what does."""
    folder.chatml(bos_token=None, eos_token=None, pad_token=None)
    rows = [{"messages": [say.user("q"), say.bot("a")]}]
    loaded = folder.rows(rows, "chat", "chat", model="model.chat")
    assert loaded[0] == example(START, "user\nq", END, "\n", START, "assistant\n", ["a", END, "\n"])
    folder.chatml(bos_token=None, eos_token=None, pad_token=None, ends=[END, 7])
    loaded = folder.load("data.own", "chat", model="model.chat")
    assert loaded[0] == example(START, "user\nq", END, "\n", START, "assistant\n", ["a", END])


def test_a_stop_id_is_appended_where_the_template_writes_none(folder, say):
    template = "{% for m in messages %}{{ m.role[0] + m.content + ';' }}{% endfor %}"
    folder.chatml(template + "{% if add_generation_prompt %}{{ 'a' }}{% endif %}")
    rows = [{"messages": [say.user("q"), say.bot("x"), say.user("r"), say.bot("y")]}]
    loaded = folder.rows(rows, "chat", "chat", model="model.chat")
    assert loaded[0] == example("uq;a", ["x;"], "ur;a", ["y;", END])


def test_a_template_that_takes_reasoning_out_of_earlier_answers(folder, say):
    """Like Qwen3's: only the last answer gets an (empty) reasoning block."""
    folder.chatml(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if loop.last and m.role == 'assistant' %}{{ '(think)' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    rows = [{"messages": [say.user("q"), say.bot("a"), say.user("r"), say.bot("b")]}]
    loaded = folder.rows(rows, "chat", "chat", model="model.chat")
    assert loaded[0] == example(
        START, "user\nq", END, "\n", START, "assistant\n", ["a", END], "\n",
        START, "user\nr", END, "\n", START, "assistant\n", ["(think)b", END],
    )  # fmt: skip


def test_an_earlier_answer_without_an_end_cannot_be_found(folder, say):
    folder.chatml(
        "{% for m in messages %}{{ m.role[0] + m.content }}"
        "{% if loop.last and m.role == 'assistant' %}!{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    rows = [{"messages": [say.user("q"), say.bot("x"), say.user("r"), say.bot("y")]}]
    with pytest.raises(UserError, match="E0841"):
        folder.rows(rows, "chat", "chat", model="model.chat")


def test_a_template_that_rewrites_the_prompt_is_an_error(folder, say):
    folder.chatml(
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}:{% endif %}"
    )
    for format, read, row in (
        ("chat", "chat", {"messages": [say.user("q"), say.bot("a")]}),
        ("preference", "preference", {"prompt": "q", "chosen": "a", "rejected": "b"}),
    ):
        with pytest.raises(UserError, match="E0841") as caught:
            folder.rows([row], format, read, model="model.chat")
        assert (caught.value.place, caught.value.at) == ("own.jsonl:1", "model.chat.template")


def test_a_conversation_that_the_template_refuses_is_named(folder, say):
    folder.chatml(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    rows = [{"prompt": [say.user("q")]}, {"prompt": [say.system("s"), say.user("q")]}]
    with pytest.raises(UserError, match="E0840.*System role not supported") as caught:
        folder.rows(rows, "prompt", "prompt", model="model.chat")
    assert (caught.value.place, caught.value.at) == ("own.jsonl:2", "model.chat.template")
    assert "human_assistant" in caught.value.help


def test_a_template_shows_the_same_day_on_every_day(folder):
    template = "{{ strftime_now('%A, %d %B %Y') }} {{ messages[0].content }}"
    folder.chatml(template)
    assert (
        folder.rows([{"prompt": "q"}], "prompt", "prompt", model="model.chat")[0].text
        == "Friday, 26 July 2024 q"
    )


def test_training_and_rollout_see_the_same_prompt(folder, say):
    folder.chatml()
    pair = {"prompt": [say.user("q"), say.bot("a"), say.user("né 日")], "chosen": "b", "rejected": "c"}
    for model in ("model.bytes", "model.chat"):
        prompt = folder.rows([pair], "preference", "prompt", model=model)[0].ids
        trained = folder.load("data.own", "chat", model=model)[0]
        assert trained.ids[: trained.loss.index(True)] == prompt
        judged = folder.load("data.own", "preference", model=model)[0]
        assert judged.rejected.ids[: len(prompt)] == judged.chosen.ids[: len(prompt)] == prompt


def test_an_answer_ends_at_its_first_stop_id(folder, say):
    rows = folder.rows([{"messages": [say.user("q"), say.bot("a<eos>b")]}], "chat", "chat")
    assert rows[0] == example(BOS, "\n\nHuman: q\n\nAssistant:", [" a", EOS])
    folder.chatml(ends=[ord(";")])
    talk = [say.user("q"), say.bot("a;b"), say.user("r"), say.bot("c;d")]
    rows = folder.rows([{"messages": talk}], "chat", "chat", model="model.chat")
    assert rows[0] == example(
        START, "user\nq", END, "\n", START, "assistant\n", ["a;"], "b", END, "\n",
        START, "user\nr", END, "\n", START, "assistant\n", ["c;"],
    )  # fmt: skip
