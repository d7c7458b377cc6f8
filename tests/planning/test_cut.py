"""The cut of rows of unequal lengths: every row once, within the room of a micro batch, and far less padding; and the
rows that stand for the lengths of an edge."""

import random
from itertools import product
from statistics import mean, quantiles

import pytest

from rlhfdsl.planning.catalog import lookup, parameters, shape
from rlhfdsl.planning.cut import BACKWARD_HOOKS, HOOKS, SPREAD, Lengths, PassCost, by_length, passes


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


def test_unequal_answers_are_padded_little():
    """Answers whose lengths spread as those of chat models do (log-normal, median 64, cut at 256), prompts of 64."""
    draw = random.Random(7)
    lengths = [64 + min(256, round(draw.lognormvariate(4.16, 0.8))) for _ in range(256)]
    in_order = [list(range(start, start + 16)) for start in range(0, 256, 16)]
    parts = by_length(lengths, 16 * 320, PassCost(500))
    assert padded(in_order, lengths) > 1.6 * sum(lengths)
    assert padded(parts, lengths) < 1.15 * sum(lengths) and len(parts) < len(in_order)


def test_what_a_pass_costs_beside_its_tokens():
    """An H100 makes 4e14 FLOP/s and launches a layer of a forward in 0.7 ms; OPT-1.3B has 388 tensors."""
    count = parameters(shape(lookup("facebook/opt-1.3b")))
    token = 6 * count / 4e14
    cost = PassCost.of("cuda", 24, count, True, 388)
    assert cost.launches * token == pytest.approx(4 * 24 * 0.7e-3)
    assert cost.hooks * token == pytest.approx(388 * (HOOKS + BACKWARD_HOOKS))
    pairs = cost.over(2)
    assert (pairs.launches, pairs.hooks) == (cost.launches / 2, cost.hooks / 2)
    # where ZeRO 3 gathers for each pass, two rows share one that have one each where it does not
    assert by_length([9, 1], 100, PassCost(7)) == [[0], [1]]
    assert by_length([9, 1], 100, PassCost(7, hooks=2)) == [[0, 1]]


def test_rows_that_stand_for_lengths():
    draw = random.Random(5)
    whole = sorted(max(16, min(512, int(draw.lognormvariate(4.8, 0.8)))) for _ in range(20000))
    cuts = quantiles(whole, n=100, method="inclusive")
    facts = {"mean": mean(whole), "p50": cuts[49], "p90": cuts[89], "p99": cuts[98], "max": whole[-1]}
    rows = Lengths.of_facts(facts).rows(64)
    assert rows == sorted(rows) and rows[0] >= 1 and rows[-1] <= 512
    assert mean(rows) == pytest.approx(facts["mean"], rel=0.03)
    for share in (0.25, 0.5, 0.75, 0.9):
        assert rows[int(64 * share)] == pytest.approx(whole[int(20000 * share)], rel=0.25), share
    assert Lengths.of_facts(facts).behind(10).rows(64) == pytest.approx([row + 10 for row in rows], rel=0.1)
    even = {"mean": 7.0, "p50": 7, "p90": 7, "p99": 7, "max": 7}
    assert Lengths.of_facts(even).rows(3) == [7.0] * 3 == Lengths(7.0).rows(3)


def test_passes_by_hand():
    # rows of 20, 2.7, 1.8 and 1.2 in 60 tokens: all four packed, 26 and 54 at a quarter; padded, the long one and three
    lengths = Lengths(6.5, ((0.7, 3.0), (0.75, 20.0), (1.0, 20.0)))
    rows = lengths.rows(4)
    whole = sum(rows)
    packed = passes(lengths, 4, 60, PassCost(20, True))
    assert (packed.count, packed.real, packed.computed) == pytest.approx((1, whole, whole))
    assert (packed.attended, packed.launched) == pytest.approx((4 * rows[-1] ** 2, 1 + SPREAD))
    padded = passes(lengths, 4, 60, PassCost(50))
    assert padded.count == padded.launched == 2 and padded.real == pytest.approx(whole)
    assert padded.computed == pytest.approx(rows[3] + 3 * rows[2])
    assert padded.attended == pytest.approx(rows[3] ** 2 + 3 * rows[2] ** 2)
    # of full rows as many passes as micro batches, and a pass for few of them
    full = passes(Lengths(512.0), 32, 8 * 512, PassCost(100.0, True))
    assert (full.count, full.real, full.computed, full.attended) == (4, 32 * 512, 32 * 512, 32 * 512**2)
    assert passes(Lengths(512.0), 1024, 8 * 512, PassCost(100.0)).count == 128
    assert passes(Lengths(256.0), 24, 8 * 512, PassCost(100.0)).count == 2  # shorter ones, more at a time
    assert passes(Lengths(512.0), 1, 256, PassCost(100.0)).count == 1
