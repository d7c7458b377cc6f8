"""The order in which rows are read: a pure function of a seed, so that a cursor is one integer.

The permutation sorts the rows by a hash of (seed, epoch, row). It is written out here because the streams of
numpy's generators may change between its versions, and a run must read the same batches after an upgrade.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_WORD = (1 << 64) - 1


@lru_cache(maxsize=8)
def order(n: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """A read-only permutation [n] of the rows in `epoch`: by hash, or 0, 1, 2, … without `shuffle`."""
    rows = np.arange(n, dtype=np.int64)
    if shuffle:
        start = _mix_one(_mix_one(seed & _WORD) + epoch)
        keys = _mix(np.arange(n, dtype=np.uint64) + np.uint64(start))
        rows = np.argsort(keys, kind="stable").astype(np.int64)
    rows.setflags(write=False)
    return rows


def batch_rows(n: int, batch: int, update: int, seed: int, shuffle: bool) -> list[int]:
    """The rows of update `update` (from 0, over all epochs), `batch` of them, of a source with `n` rows.

    An epoch has n // batch updates; what is left over at its end is not read in it. Raises ValueError when
    the rows do not fill one batch.
    """
    each_epoch = n // batch
    if each_epoch == 0:
        raise ValueError(f"{n} rows do not fill one batch of {batch}")
    epoch, step = divmod(update, each_epoch)
    return order(n, seed, epoch, shuffle)[step * batch : (step + 1) * batch].tolist()


def _mix(x: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele, Lea, Flood 2014) on uint64, in which overflow wraps."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_one(value: int) -> int:
    return int(_mix(np.array([value & _WORD], dtype=np.uint64))[0])
