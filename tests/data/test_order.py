"""The order of rows, and batches of them."""

from __future__ import annotations

import pytest
import torch

from rlhfdsl.data.collate import collate
from rlhfdsl.data.edge import Example
from rlhfdsl.data.order import batch_rows, order


def test_order_is_a_permutation_of_seed_and_epoch():
    assert sorted(order(1000, 1, 0, True)) == list(range(1000))
    assert list(order(5, 1, 3, False)) == [0, 1, 2, 3, 4]
    orders = {tuple(order(50, seed, epoch, True)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_order_never_changes():
    """Splitmix64 in plain integers, beside the vectorised one."""
    word = 2**64

    def mix(x):
        x = (x + 1) * 0x9E3779B97F4A7C15 % word
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % word
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % word
        return x ^ (x >> 31)

    for seed, epoch in ((0, 0), (7, 2), (2**63, 1)):
        start = mix((mix(seed) + epoch) % word)
        keys = [mix((i + start) % word) for i in range(100)]
        assert list(order(100, seed, epoch, True)) == sorted(range(100), key=keys.__getitem__)


def test_order_looks_shuffled():
    """Over 600 orders of 3 rows, each of the six comes about 100 times: within four standard deviations."""
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(600):
        key = tuple(order(3, 11, epoch, True))
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 6
    assert all(abs(n - 100) < 4 * (600 / 6 * 5 / 6) ** 0.5 for n in counts.values())


def test_a_cursor_is_one_integer():
    """10 rows in batches of 3: three updates an epoch, one row left over, another order in the next epoch."""
    first = [row for update in range(3) for row in batch_rows(10, 3, update, 5, True)]
    assert first == list(order(10, 5, 0, True))[:9]
    second = [row for update in range(3, 6) for row in batch_rows(10, 3, update, 5, True)]
    assert second == list(order(10, 5, 1, True))[:9]
    assert batch_rows(10, 3, 4, 5, False) == [3, 4, 5]
    with pytest.raises(ValueError, match="2 rows do not fill one batch of 3"):
        batch_rows(2, 3, 0, 5, True)


def test_collate_pads_on_the_right_and_masks_by_length():
    """The pad id is a real token here, and neither its tokens nor their loss are lost."""
    rows = [Example([5, 2, 2], [False, True, True]), Example([2], [False])]
    batch = collate(rows, pad_id=2)
    assert batch.ids.tolist() == [[5, 2, 2], [2, 2, 2]]
    assert batch.lengths.tolist() == [3, 1]
    assert batch.loss.tolist() == [[False, True, True], [False, False, False]]
    assert (batch.ids.dtype, batch.lengths.dtype, batch.loss.dtype) == (torch.int64, torch.int64, torch.bool)
    other = collate(rows, pad_id=9)
    assert other.ids.tolist() == [[5, 2, 2], [2, 9, 9]]
    assert torch.equal(other.loss, batch.loss)
    assert torch.equal(other.lengths, batch.lengths)
    assert batch.to("cpu").ids.tolist() == batch.ids.tolist()
