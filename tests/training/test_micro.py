"""Micro batches of like lengths: every row once, within the tokens of a full one, and far less padding."""

import random
from itertools import product
from types import SimpleNamespace

from rlhfdsl.engines.passes import PassCost
from rlhfdsl.training.micro import by_length, in_parts, in_turn, micro_pairs, micro_parts


def padded(parts, lengths):
    return sum(len(rows) * max(lengths[row] for row in rows) for rows in parts)


def test_a_cut_by_hand():
    # 20 tokens fit: one row of 12, two of 9, three of 5 (15), two of 3 (6). Where 25 fit the last five are one micro
    # batch, 25 and a pass, if a pass costs more than 4 tokens: two are 15 + 6 and two passes.
    assert by_length([9, 5, 4, 8, 12, 5, 3, 1], 20, PassCost(3)) == [[4], [0, 3], [1, 5, 2], [6, 7]]
    assert by_length([9, 5, 4, 8, 12, 5, 3, 1], 25, PassCost(3)) == [[4], [0, 3], [1, 5, 2], [6, 7]]
    assert by_length([9, 5, 4, 8, 12, 5, 3, 1], 25, PassCost(5)) == [[4], [0, 3], [1, 5, 2, 6, 7]]
    assert by_length([], 20, PassCost(3)) == []


def test_a_pass_is_worth_its_padding():
    assert by_length([9, 1], 100, PassCost(10)) == [[0, 1]]  # 18 + 10 before 9 + 1 + 2 x 10
    assert by_length([9, 1], 100, PassCost(7)) == [[0], [1]]  # 9 + 1 + 2 x 7 before 18 + 7
    assert by_length([30, 1], 20, PassCost(50)) == [[0], [1]]  # a row that is too long is alone


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
        assert cost(by_length(lengths, room, PassCost(beside))) == min(cuts)


def test_every_row_once_and_none_too_wide():
    lengths = [random.Random(1).randint(1, 64) for _ in range(50)]
    parts = by_length(lengths, 4 * 64, PassCost(20))
    assert sorted(row for rows in parts for row in rows) == list(range(50))
    assert all(len(rows) * max(lengths[row] for row in rows) <= 4 * 64 for rows in parts)


def test_more_parts_for_a_rank_that_has_fewer():
    assert in_parts([[4, 2, 0, 1], [3]], 4) == [[4], [2], [0, 1], [3]]
    assert in_parts([[1], [0]], 2) == [[1], [0]]


def test_a_minibatch_keeps_its_rows():
    engine = SimpleNamespace(micro=2, cost=PassCost(100.0))
    cut = micro_parts([5, 1, 9, 8], engine, 9, size=2)
    assert [[rows.tolist() for rows in parts] for parts in cut] == [[[0, 1]], [[2, 3]]]


def test_padding_that_attention_alone_sees():
    # 9 + 1 tokens and 8 of padding at a quarter, or two passes of 10
    assert by_length([9, 1], 100, PassCost(7, True)) == [[0, 1]]  # 12 + 7 + 1.4 before 10 + 2 x 7
    assert by_length([9, 1], 100, PassCost(1, True)) == [[0], [1]]  # 10 + 2 x 1 before 12 + 1 + 0.2
    assert by_length([9, 1], 11, PassCost(7, True)) == [[0], [1]]  # 12 tokens have no room
    # the last three are 8 tokens and 1 of padding, at a quarter; all are 18 and 22, which take 23.5 of the room
    assert by_length([10, 3, 3, 2], 10, PassCost(1, True)) == [[0], [1, 2, 3]]
    assert by_length([10, 3, 3, 2], 24, PassCost(50)) == [[0], [1, 2, 3]]  # 40 padded
    assert by_length([10, 3, 3, 2], 24, PassCost(7, True)) == [[0, 1, 2, 3]]  # 23.5 + 8.4 before 19 + 14


def test_a_pass_that_is_all_launches_keeps_its_padding():
    # 12 of 60 kernels more, which are worth 0.2 x 100 tokens; a token of padding that is left out is worth 3 / 4
    cost = PassCost(100.0, True)
    assert not cost.packed(74, 100) and cost.tokens(74, 100) == 100 and cost.whole(74, 100) == 200
    assert cost.packed(73, 100) and cost.tokens(73, 100) == 79.75 and cost.whole(73, 100) == 199.75
    assert not PassCost(100.0).packed(1, 1000)


def test_pairs_take_what_both_of_their_sequences_have():
    # padded to 20, 20 and 18 tokens a sequence: two pairs fill 40; of real ones 11, 20 and 10 in the mean
    lengths = [(20, 2), (20, 20), (2, 18)]
    assert [rows.tolist() for rows in micro_pairs(lengths, SimpleNamespace(micro=2, cost=PassCost(0.0)), 20)] == [
        [0, 1], [2],
    ]  # fmt: skip
    # 41 and 19 of padding at a quarter have 45.75 of 46, and take a pass of 12 less than two
    engine = SimpleNamespace(micro=2, cost=PassCost(24.0, True))
    assert [rows.tolist() for rows in micro_pairs(lengths, engine, 23)] == [[0, 1, 2]]
    assert len(micro_pairs(lengths, engine, 22)) == 2


def test_unequal_answers_are_padded_little():
    """Answers whose lengths spread as those of chat models do (log-normal, median 64, cut at 256), prompts of 64."""
    draw = random.Random(7)
    lengths = [64 + min(256, round(draw.lognormvariate(4.16, 0.8))) for _ in range(256)]
    in_order = [list(range(start, start + 16)) for start in range(0, 256, 16)]
    parts = by_length(lengths, 16 * 320, PassCost(500))
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
