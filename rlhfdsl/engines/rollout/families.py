"""Attention over a row cache for the types that are not behind transformers' attention interface.

BLOOM, Falcon, GPT-J, GPT-Neo and MPT attend in their own modules. For the time of a rollout each such module has a
forward from here: it projects as its own does, and attends as every other type does. These models get no mask, under
which they make none, and so the row lengths come with the cache. A forward reads no value from the device, since a
decode step is captured in a CUDA graph.

OPT is behind the interface, but scales its queries before: here attention scales, with one kernel less.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import nn
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon
from transformers.models.gpt_neo import modeling_gpt_neo
from transformers.models.gptj import modeling_gptj
from transformers.models.mpt import modeling_mpt
from transformers.models.opt import modeling_opt

from rlhfdsl.engines.rollout.attention import attend
from rlhfdsl.engines.rollout.cache import RowCache


def _bloom(
    module: nn.Module, hidden_states: torch.Tensor, residual: torch.Tensor, layer_past: RowCache, **kwargs: object
) -> tuple[torch.Tensor, None]:
    projected = module.query_key_value(hidden_states).unflatten(-1, (-1, 3, module.head_dim))
    query, key, value = projected.permute(3, 0, 2, 1, 4)
    out = _attended(module.layer_idx, layer_past, query, key, value, _bloom_bias)
    return residual + module.dense(out), None


def _falcon(
    module: nn.Module,
    hidden_states: torch.Tensor,
    alibi: torch.Tensor | None,
    layer_past: RowCache,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    # a key and a value after the queries that share them, in each of its three layouts
    projected = module.query_key_value(hidden_states).unflatten(-1, (module.num_kv_heads, -1, module.head_dim))
    query = projected[..., :-2, :].flatten(2, 3).transpose(1, 2)
    key, value = projected[..., -2, :].transpose(1, 2), projected[..., -1, :].transpose(1, 2)
    if alibi is None:
        query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
    bias = None if alibi is None else partial(_falcon_bias, module.head_dim)
    return module.dense(_attended(module.layer_idx, layer_past, query, key, value, bias)), None


def _gptj(
    module: nn.Module,
    hidden_states: torch.Tensor,
    layer_past: RowCache,
    position_ids: torch.Tensor,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    query, key, value = _projected(module, hidden_states)
    sin, cos = module.embed_positions[position_ids].to(key.dtype).chunk(2, -1)
    turned = [
        torch.cat([
            modeling_gptj.apply_rotary_pos_emb(x[..., : module.rotary_dim], sin, cos), x[..., module.rotary_dim :]
        ], -1).transpose(1, 2)
        for x in (query, key)
    ]  # fmt: skip
    return module.out_proj(_attended(module.layer_idx, layer_past, *turned, value.transpose(1, 2))), None


def _gpt_neo(
    module: nn.Module, hidden_states: torch.Tensor, layer_past: RowCache, **kwargs: object
) -> tuple[torch.Tensor, None]:
    query, key, value = (x.transpose(1, 2) for x in _projected(module, hidden_states))
    window = module.config.window_size if module.attention_type == "local" else None
    out = _attended(module.layer_id, layer_past, query, key, value, scaling=1.0, sliding_window=window)
    return module.out_proj(out), None


def _mpt(
    module: nn.Module, hidden_states: torch.Tensor, past_key_values: RowCache, **kwargs: object
) -> tuple[torch.Tensor, None]:
    projected = module.Wqkv(hidden_states)
    if module.clip_qkv:
        projected = projected.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = projected.unflatten(-1, (3, -1, module.head_dim)).permute(2, 0, 3, 1, 4)
    scale = module.softmax_scale
    return module.out_proj(
        _attended(module.layer_idx, past_key_values, query, key, value, _mpt_bias, scaling=scale)
    ), None


def _opt(
    module: nn.Module, hidden_states: torch.Tensor, past_key_values: RowCache, **kwargs: object
) -> tuple[torch.Tensor, None]:
    query, key, value = (x.transpose(1, 2) for x in _projected(module, hidden_states))
    out = _attended(module.layer_idx, past_key_values, query, key, value, scaling=module.scaling)
    return module.out_proj(out), None


def _projected(module: nn.Module, hidden_states: torch.Tensor) -> list[torch.Tensor]:
    """Query, key and value [B, T, H, D]."""
    layers = (module.q_proj, module.k_proj, module.v_proj)
    return [layer(hidden_states).unflatten(-1, (-1, module.head_dim)) for layer in layers]


def _attended(
    layer: int,
    rows: RowCache,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    alibi: Callable[[int, int, torch.dtype, torch.device], torch.Tensor] | None = None,
    **options: float | None,
) -> torch.Tensor:
    """Keep keys and values [B, Hkv, T, D] of a layer and attend with query [B, H, T, D]: [B, T, H x D].

    alibi: gives the bias [H, columns] for heads, columns, dtype and device.
    """
    key, value = rows.update(key, value, layer)
    bias = None
    if alibi is not None:
        # of a power of two columns, so that there are few of them, and each stays where a captured graph reads it
        columns = 1 << (key.shape[2] - 1).bit_length()
        bias = alibi(query.shape[1], columns, query.dtype, query.device)[:, : key.shape[2]]
    out, _ = attend(None, query, key, value, rows.lengths, bias=bias, **options)
    return out.flatten(2)


# -- alibi, in the values that each model adds: those of a long row lie far apart in bf16 ------------------------------


@cache
def _bloom_bias(heads: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """BLOOM adds in the model's dtype."""
    seen = torch.ones(1, columns, dtype=torch.int64, device=device)
    return modeling_bloom.build_alibi_tensor(seen, heads, dtype)[:, 0]


@cache
def _falcon_bias(size: int, heads: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Falcon rounds to bf16 first, and scales as it does the scores; the sum is in fp32."""
    seen = torch.ones(1, columns, dtype=torch.int64, device=device)
    return (modeling_falcon.build_alibi_tensor(seen, heads, dtype)[:, 0] / math.sqrt(size)).float()


@cache
def _mpt_bias(heads: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """MPT adds in fp32."""
    return modeling_mpt.build_mpt_alibi_tensor(heads, columns, device=device)[:, 0]


# -- for the time of a rollout -----------------------------------------------------------------------------------------

_FAMILIES: dict[type[nn.Module], tuple[type[nn.Module], Callable]] = {
    modeling_bloom.BloomPreTrainedModel: (modeling_bloom.BloomAttention, _bloom),
    modeling_falcon.FalconPreTrainedModel: (modeling_falcon.FalconAttention, _falcon),
    modeling_gptj.GPTJPreTrainedModel: (modeling_gptj.GPTJAttention, _gptj),
    modeling_gpt_neo.GPTNeoPreTrainedModel: (modeling_gpt_neo.GPTNeoSelfAttention, _gpt_neo),
    modeling_mpt.MptPreTrainedModel: (modeling_mpt.MptAttention, _mpt),
    modeling_opt.OPTPreTrainedModel: (modeling_opt.OPTAttention, _opt),
}


def gets_no_mask(model: nn.Module) -> bool:
    """Whether the row lengths cannot come as a mask that the model hands through."""
    return isinstance(model, tuple(_FAMILIES)) and not isinstance(model, modeling_opt.OPTPreTrainedModel)


@contextlib.contextmanager
def own_attention(model: nn.Module) -> Iterator[None]:
    """While open, a model of these types attends over a row cache; any other is left alone."""
    replaced = []
    make_mask = modeling_mpt.create_causal_mask
    for family, (kind, forward) in _FAMILIES.items():
        if isinstance(model, family):
            replaced = [module for module in model.modules() if isinstance(module, kind)]
            for module in replaced:
                module.forward = partial(forward, module)
    if isinstance(model, modeling_mpt.MptPreTrainedModel):
        modeling_mpt.create_causal_mask = _no_mask
    try:
        yield
    finally:
        for module in replaced:
            del module.forward
        modeling_mpt.create_causal_mask = make_mask


def _no_mask(inputs_embeds: torch.Tensor, **kwargs: object) -> torch.Tensor:
    """MPT makes its mask bool without a look at whether there is one."""
    return inputs_embeds.new_empty(0)
