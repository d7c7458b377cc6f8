"""Micro batches of like lengths: every row once, within the tokens of a full one, and far less padding."""

import random
from itertools import product
from types import SimpleNamespace

from rlhfdsl.training.micro import by_length, in_parts, in_turn, micro_pairs, micro_parts


def padded(parts, lengths):
    return sum(len(rows) * max(lengths[row] for row in rows) for rows in parts)


def test_a_cut_by_hand():
    # 20 tokens fit: one row of 12, two of 9, three of 5 (15), two of 3 (6). Where 25 fit the last five are one micro
    # batch, 25 and a pass, if a pass costs more than 4 tokens: two are 15 + 6 and two passes.
    assert by_length([9, 5, 4, 8, 12, 5, 3, 1], 20, 3) == [[4], [0, 3], [1, 5, 2], [6, 7]]
    assert by_length([9, 5, 4, 8, 12, 5, 3, 1], 25, 3) == [[4], [0, 3], [1, 5, 2], [6, 7]]
    assert by_length([9, 5, 4, 8, 12, 5, 3, 1], 25, 5) == [[4], [0, 3], [1, 5, 2, 6, 7]]
    assert by_length([], 20, 3) == []


def test_a_pass_is_worth_its_padding():
    assert by_length([9, 1], 100, 10) == [[0, 1]]  # 18 + 10 before 9 + 1 + 2 x 10
    assert by_length([9, 1], 100, 7) == [[0], [1]]  # 9 + 1 + 2 x 7 before 18 + 7
    assert by_length([30, 1], 20, 50) == [[0], [1]]  # a row that is too long is alone


def test_no_cut_costs_less():
    draw = random.Random(3)
    for _ in range(30):
        lengths = sorted((draw.randint(1, 30) for _ in range(8)), reverse=True)
        room, beside = draw.randint(30, 90), draw.randint(0, 40)

        def cost(parts, lengths=lengths, beside=beside):
            return padded(parts, lengths) + beside * len(parts)

        cuts = []
        for joints in product((False, True), repeat=7):
            cut = [[0]]
            for row, begins in enumerate(joints, 1):
                cut = [*cut, [row]] if begins else [*cut[:-1], [*cut[-1], row]]
            if all(len(rows) * lengths[rows[0]] <= room for rows in cut):
                cuts.append(cost(cut))
        assert cost(by_length(lengths, room, beside)) == min(cuts)


def test_every_row_once_and_none_too_wide():
    lengths = [random.Random(1).randint(1, 64) for _ in range(50)]
    parts = by_length(lengths, 4 * 64, 20)
    assert sorted(row for rows in parts for row in rows) == list(range(50))
    assert all(len(rows) * max(lengths[row] for row in rows) <= 4 * 64 for rows in parts)


def test_more_parts_for_a_rank_that_has_fewer():
    assert in_parts([[4, 2, 0, 1], [3]], 4) == [[4], [2], [0, 1], [3]]
    assert in_parts([[1], [0]], 2) == [[1], [0]]


def test_a_minibatch_keeps_its_rows():
    engine = SimpleNamespace(micro=2, pass_tokens=100.0, padding=1.0)
    cut = micro_parts([5, 1, 9, 8], engine, 9, size=2)
    assert [[rows.tolist() for rows in parts] for parts in cut] == [[[0, 1]], [[2, 3]]]


def test_padding_that_attention_alone_sees():
    # 9 + 1 tokens and 8 of padding at a quarter, 12 and a pass of 7, before 9 + 1 and two passes
    assert by_length([9, 1], 100, 7, padding=0.25) == [[0, 1]]
    assert by_length([9, 1], 100, 1, padding=0.25) == [[0], [1]]  # 13 before 12
    assert by_length([9, 1], 11, 7, padding=0.25) == [[0], [1]]  # 12 tokens have no room
    assert by_length([9, 1], 12, 7, padding=0.25) == [[0, 1]]


def test_pairs_take_what_both_of_their_sequences_have():
    # padded to 20, 20 and 18 tokens a sequence: two pairs fill 40; of real ones 11, 20 and 10 in the mean
    lengths = [(20, 2), (20, 20), (2, 18)]
    engine = SimpleNamespace(micro=2, pass_tokens=0.0, padding=1.0)
    assert [rows.tolist() for rows in micro_pairs(lengths, engine, 20)] == [[0, 1], [2]]
    engine = SimpleNamespace(micro=2, pass_tokens=20.0, padding=0.0)
    assert [rows.tolist() for rows in micro_pairs(lengths, engine, 21)] == [[0, 1, 2]]


def test_unequal_answers_are_padded_little():
    """Answers whose lengths spread as those of chat models do (log-normal, median 64, cut at 256), prompts of 64."""
    draw = random.Random(7)
    lengths = [64 + min(256, round(draw.lognormvariate(4.16, 0.8))) for _ in range(256)]
    in_order = [list(range(start, start + 16)) for start in range(0, 256, 16)]
    parts = by_length(lengths, 16 * 320, 500)
    assert padded(in_order, lengths) > 1.6 * sum(lengths)
    assert padded(parts, lengths) < 1.15 * sum(lengths) and len(parts) < len(in_order)


def test_micro_batches_of_several_engines_come_in_turn():
    order = []

    def passes(name, count):
        for number in range(count):
            order.append((name, number))
            yield
        return {name: float(count)}

    assert in_turn([passes("a", 1), passes("b", 3), passes("c", 2)]) == {"a": 1.0, "b": 3.0, "c": 2.0}
    assert order == [("a", 0), ("b", 0), ("c", 0), ("b", 1), ("c", 1), ("b", 2)]
    assert in_turn([]) == {}
