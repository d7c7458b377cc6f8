"""Micro batches of minibatches and of pairs, as many on every rank, and those of several engines in turn."""

from types import SimpleNamespace

from rlhfdsl.planning.cut import PassCost
from rlhfdsl.training.micro import in_parts, in_turn, micro_pairs, micro_parts


def test_more_parts_for_a_rank_that_has_fewer():
    assert in_parts([[4, 2, 0, 1], [3]], 4) == [[4], [2], [0, 1], [3]]
    assert in_parts([[1], [0]], 2) == [[1], [0]]


def test_a_minibatch_keeps_its_rows():
    engine = SimpleNamespace(micro=2, cost=PassCost(100.0))
    cut = micro_parts([5, 1, 9, 8], engine, 9, size=2)
    assert [[rows.tolist() for rows in parts] for parts in cut] == [[[0, 1]], [[2, 3]]]


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
