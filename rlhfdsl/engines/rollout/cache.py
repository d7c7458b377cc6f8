"""A static KV cache in which every row has its own write position.

transformers' own StaticCache has one write position for the whole batch and attends over its full length. This one
serves rows of unequal length without left padding, and a row can be given to another prompt at any time.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, StaticLayer


class RowLayer(StaticLayer):
    """Keys and values of one decoder layer, [rows, kv heads, columns, head size], under unmodified models.

    The owner says what the next forward is:
    fill(rows, source): prompts [P, T]; row rows[i] gets keys and values of prompt source[i], columns 0 to T - 1. The
    prompts attend to themselves.
    decode(write): one token for each of the first B rows, put in column write[b]; the model's attention gets the
    whole keys and values of these rows and must know how many columns of each are real. On CUDA it gets the token's own
    as `newest` of the keys, and puts them in the last real column.
    """

    def __init__(self, rows: int, columns: int):
        super().__init__(max_cache_len=columns)
        self.rows = rows
        self.filled: tuple[torch.Tensor, torch.Tensor] | None = None
        self.write: torch.Tensor | None = None

    def fill(self, rows: torch.Tensor, source: torch.Tensor) -> None:
        self.filled = (rows, source)

    def decode(self, write: torch.Tensor) -> None:
        self.filled, self.write = None, write

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        heads, columns = key_states.shape[1], self.max_cache_len
        # zeros: a column that was never written is masked, and 0 x NaN would not be 0
        self.keys = key_states.new_zeros(self.rows, heads, columns, key_states.shape[-1])
        self.values = value_states.new_zeros(self.rows, heads, columns, value_states.shape[-1])
        self.row_index = torch.arange(self.rows, device=self.device).unsqueeze(1)
        self.head_index = torch.arange(heads, device=self.device).unsqueeze(0)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.filled is not None:
            rows, source = self.filled
            columns = key_states.shape[2]
            self.keys[rows, :, :columns] = key_states[source]
            self.values[rows, :, :columns] = value_states[source]
            return key_states, value_states
        count = key_states.shape[0]
        keys, values = self.keys[:count], self.values[:count]
        if keys.is_cuda:
            keys.newest = key_states, value_states  # the attention kernel puts them there
        else:
            place = (self.row_index[:count], self.head_index, self.write.unsqueeze(1))
            keys.index_put_(place, key_states[:, :, 0])
            values.index_put_(place, value_states[:, :, 0])
        return keys, values

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


class RowCache(Cache):
    """One `RowLayer` for each decoder layer.

    lengths: the columns [B, 1, 1, 1] that attention reads in a decode step; None while prompts are read.
    """

    def __init__(self, layers: int, rows: int, columns: int):
        super().__init__(layers=[RowLayer(rows, columns) for _ in range(layers)])
        self.rows, self.columns = rows, columns
        self.lengths: torch.Tensor | None = None

    def fill(self, rows: torch.Tensor, source: torch.Tensor) -> None:
        self.lengths = None
        for layer in self.layers:
            layer.fill(rows, source)

    def decode(self, write: torch.Tensor, lengths: torch.Tensor) -> None:
        self.lengths = lengths
        for layer in self.layers:
            layer.decode(write)
