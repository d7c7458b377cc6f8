"""Parts and shares: who belongs where, how many of each, and that nothing moves when something else does."""

from __future__ import annotations

from collections import Counter

import pytest

from rlhfdsl.data.blends import Pool, mix, part_of
from rlhfdsl.data.formats import key_of
from rlhfdsl.language.diagnostics import UserError

SPLIT = {"sft": 0.2, "reward": 0.4, "ppo": 0.38, "eval": 0.02}


def prompts_of(rows):
    return [row.text.split("Human: ")[1].split("\n\n")[0] for row in rows]


def shares_of(picks):
    return Counter(source for source, _ in picks)


def pool(n, tokens=1):
    return Pool(ranks=[(i * 7919) % 1009 for i in range(n)], tokens=[tokens] * n)


def test_parts_by_hand():
    """The names in order share [0, 1): eval to 0.02, ppo to 0.4, reward to 0.8, sft to 1."""
    for place, part in ((0, "eval"), (0.0199, "eval"), (0.0201, "ppo"), (0.41, "reward"), (0.99999, "sft")):
        key = f"{int(place * 2**64):016x}" + "0" * 48
        assert part_of(key, SPLIT) == part
        assert part_of(key, dict(reversed(SPLIT.items()))) == part
    assert part_of("f" * 64, SPLIT) == "sft"
    assert part_of("f" * 64, {"a": 0.5}) is None


def test_parts_are_as_large_as_they_should_be():
    """Of 20 000 prompts, each part is within four standard deviations of its share."""
    n = 20_000
    counts = Counter(part_of(key_of(f"prompt {i}"), SPLIT) for i in range(n))
    for part, share in SPLIT.items():
        assert abs(counts[part] - n * share) < 4 * (n * share * (1 - share)) ** 0.5


def test_a_row_keeps_its_part_when_others_come_and_go(folder):
    rows = [{"prompt": f"p{i}"} for i in range(60)]
    split = {"a": 0.5, "b": 0.3, "c": 0.2}

    def parts(rows):
        folder.write("own.jsonl", rows)
        folder.data("data.own", "own.jsonl", "prompt")
        folder.blend({"": {"data.own": 1.0}}, split)
        loaded = {part: prompts_of(folder.load("blend.b", "prompt", part=part)) for part in split}
        return {prompt: part for part, prompts in loaded.items() for prompt in prompts}

    before = parts(rows)
    assert len(before) == 60
    more = parts([{"prompt": "new"}, *reversed(rows), {"prompt": "newer"}])
    assert {prompt: more[prompt] for prompt in before} == before
    fewer = parts(rows[20:50])
    assert fewer == {prompt: before[prompt] for prompt in fewer}


def test_parts_share_no_prompt_over_several_sources(folder, say):
    """The same prompts as pairs of text, as hh dialogues and as chats, in two sources."""
    pairs = [{"prompt": f"p{i % 40}", "chosen": f"a{i}", "rejected": "b"} for i in range(80)]
    chats = [{"messages": [say.user(f" p{i}"), say.bot("c")]} for i in range(40)]
    heads = [f"\n\nHuman: p{i}\n\nAssistant:" for i in range(40)]
    hh = [{"chosen": f"{head} a", "rejected": f"{head} b"} for head in heads]
    sources = (("pairs", pairs, "preference"), ("chats", chats, "chat"), ("hh", hh, "preference"))
    for name, rows, format in sources:
        folder.write(f"{name}.jsonl", rows)
        folder.data(f"data.{name}", f"{name}.jsonl", format, turns="hh" if name == "hh" else "none")
    folder.blend({"": {"data.pairs": 0.4, "data.chats": 0.3, "data.hh": 0.3}}, {"x": 0.5, "y": 0.5})
    x, y = (set(prompts_of(folder.load("blend.b", "prompt", part=part))) for part in "xy")
    assert x and y
    assert not x & y


@pytest.mark.parametrize(
    ("until", "sizes", "shares", "expected"),
    [
        # 100 rows are a fifth of 500; a tenth share would allow 1000, so the first source ends it.
        ("first", {"a": 400, "b": 200}, {"a": 0.8, "b": 0.2}, {"a": 400, "b": 100}),
        ("first", {"a": 1000, "b": 50}, {"a": 0.8, "b": 0.2}, {"a": 200, "b": 50}),
        ("all", {"a": 1000, "b": 50}, {"a": 0.8, "b": 0.2}, {"a": 1000, "b": 250}),
        ("all", {"a": 400, "b": 200}, {"a": 0.8, "b": 0.2}, {"a": 800, "b": 200}),
        # Ten thirds of a row: amounts are whole rows, rounded down.
        ("first", {"a": 10, "b": 10, "c": 10}, {"a": 0.6, "b": 0.3, "c": 0.1}, {"a": 10, "b": 5, "c": 1}),
        # 0.1 is one tenth: in binary, 3 / 0.1 is less than 30.
        ("first", {"a": 3, "b": 100}, {"a": 0.1, "b": 0.9}, {"a": 3, "b": 27}),
        ("first", {"a": 3, "b": 0}, {"a": 1.0, "b": 0.0}, {"a": 3}),
    ],
)
def test_shares_by_samples(until, sizes, shares, expected):
    picks = mix({name: pool(n) for name, n in sizes.items()}, shares, "samples", until)
    assert shares_of(picks) == expected
    repeats = Counter(picks)
    for name, n in expected.items():
        times = [repeats[name, row] for row in range(sizes[name])]
        assert max(times) == -(-n // sizes[name])
        assert until == "all" or max(times) == 1
        assert max(times) - min(times) <= 1


def test_shares_by_tokens():
    """`b` has rows of 10 tokens, `a` of 1: half of the tokens are a tenth of the rows."""
    pools = {"a": pool(100, 1), "b": pool(100, 10)}
    assert shares_of(mix(pools, {"a": 0.5, "b": 0.5}, "tokens", "first")) == {"a": 100, "b": 10}
    assert shares_of(mix(pools, {"a": 0.5, "b": 0.5}, "tokens", "all")) == {"a": 1000, "b": 100}
    # 34 tokens buy three rows of 10.
    pools = {"a": pool(34, 1), "b": pool(9, 10)}
    assert shares_of(mix(pools, {"a": 0.5, "b": 0.5}, "tokens", "first")) == {"a": 34, "b": 3}


def test_sources_are_interleaved():
    picks = mix({"a": pool(6), "b": pool(2)}, {"a": 0.75, "b": 0.25}, "samples", "first")
    assert "".join(source for source, _ in picks) == "aabaaaba"
    assert [row for source, row in picks if source == "a"] == list(range(6))


def test_a_share_takes_rows_by_their_content(folder):
    """The rows taken are the same when the file is sorted otherwise or `mix` is written otherwise."""
    few = [{"prompt": f"few{i}"} for i in range(3)]
    many = [{"prompt": f"many{i}"} for i in range(30)]

    def taken(many, mix):
        folder.write("few.jsonl", few)
        folder.write("many.jsonl", many)
        folder.data("data.few", "few.jsonl", "prompt")
        folder.data("data.many", "many.jsonl", "prompt")
        folder.blend({"": mix})
        return prompts_of(folder.load("blend.b", "prompt"))

    once = taken(many, {"data.few": 0.25, "data.many": 0.75})
    assert len(once) == 3 + 9
    assert set(taken(many[::-1], {"data.few": 0.25, "data.many": 0.75})) == set(once)
    assert taken(many, {"data.many": 0.75, "data.few": 0.25}) == once


def test_a_part_may_have_shares_of_its_own(folder):
    for name in "ab":
        folder.write(f"{name}.jsonl", [{"prompt": f"{name}{i}"} for i in range(200)])
        folder.data(f"data.{name}", f"{name}.jsonl", "prompt")
    mixes = {"": {"data.a": 0.5, "data.b": 0.5}, "y": {"data.b": 1.0}}
    folder.blend(mixes, {"x": 0.5, "y": 0.5})
    x = Counter(prompt[0] for prompt in prompts_of(folder.load("blend.b", "prompt", part="x")))
    y = Counter(prompt[0] for prompt in prompts_of(folder.load("blend.b", "prompt", part="y")))
    assert x["a"] == x["b"] > 50
    assert y["a"] == 0 < y["b"]


def test_a_share_of_nothing_is_an_error(folder):
    folder.write("a.jsonl", [{"prompt": "q"}])
    folder.write("b.jsonl", [{"prompt": "q"}, {"prompt": ""}])
    folder.write("c.jsonl", [{"prompt": ""}])
    for name in "abc":
        folder.data(f"data.{name}", f"{name}.jsonl", "prompt")
    folder.blend({"": {"data.a": 0.5, "data.c": 0.5}})
    with pytest.raises(UserError, match=r"E0631.*data.c. has a share.* has 1 row \(dropped: 1 empty\)") as caught:
        folder.load("blend.b", "prompt")
    assert (caught.value.at, caught.value.place) == ("data.c", "c.jsonl")
    folder.blend({"": {"data.a": 1.0}}, {"x": 0.999999, "y": 0.000001})
    with pytest.raises(UserError, match=r"E0632.*part y: `data.a` has 1 row, none of them in the part") as caught:
        folder.load("blend.b", "prompt", part="y")
    assert "larger share" in caught.value.help


def test_every_source_of_which_nothing_is_left_is_named_with_its_counts(folder):
    folder.write("a.jsonl", [{"prompt": "q" * 50}, {"prompt": "r" * 60}, {"prompt": ""}])
    folder.write("b.jsonl", [{"prompt": " "}, {"prompt": "s" * 70}])
    for name in "ab":
        folder.data(f"data.{name}", f"{name}.jsonl", "prompt")
    folder.blend({"": {"data.a": 0.5, "data.b": 0.5}})
    with pytest.raises(UserError, match="E0632") as caught:
        folder.load("blend.b", "prompt", length=30)
    assert caught.value.message == (
        "no row is left in blend.b: `data.a` has 3 rows (dropped: 1 empty, 2 too long); "
        "`data.b` has 2 rows (dropped: 1 empty, 1 too long)"
    )
    assert (caught.value.at, caught.value.place) == ("data.a", "a.jsonl, b.jsonl")
    assert caught.value.help == "raise `rollout.prompt` from 30 tokens, or cut them: `overlong = cut`"
