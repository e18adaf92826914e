"""Computes nn.MultiheadAttention step by step, so that the attention weights can be edited."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(
    module: nn.MultiheadAttention,
    edit: Callable[[Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Computes ``module(query, key, ...)`` in evaluation mode with ``edit`` applied to the attention weights ``[M, heads, L, S]``.

    Arguments and results are those of ``nn.MultiheadAttention.forward`` on batches, ``[M, L, E]``, or ``[L, M, E]`` without
    ``batch_first``; equal to it up to rounding if ``edit`` changes nothing. Returned weights are those after ``edit``, as torch returns
    them after dropout. ``is_causal`` is torch's hint about ``attn_mask``; the mask itself is used. All weights are in memory at once, since
    no fused attention supports keyed dropout.

    Source: Vaswani et al., Attention Is All You Need, 2017, section 3.2.
    """
    if not module.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    q, k, v = _project(module, query, key, value)
    extra = 0
    if module.bias_k is not None and module.bias_v is not None:
        k = torch.cat([k, module.bias_k.expand(len(k), 1, -1)], 1)
        v = torch.cat([v, module.bias_v.expand(len(v), 1, -1)], 1)
        extra += 1
    q, k, v = (t.unflatten(2, (module.num_heads, module.head_dim)).transpose(1, 2) for t in (q, k, v))  # [M, heads, L or S, d]
    if module.add_zero_attn:
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        extra += 1
    logits = (q / math.sqrt(module.head_dim)) @ k.transpose(2, 3)
    if attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = attn_mask.unflatten(0, (-1, module.num_heads))  # [M * heads, L, S] -> [M, heads, L, S]
    for mask in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None, :]):
        if mask is not None:
            logits = logits + F.pad(_additive(mask, logits.dtype), (0, extra))
    weights = edit(logits.softmax(3))
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    out = F.linear(mixed, module.out_proj.weight, module.out_proj.bias)
    returned = None if not need_weights else weights.mean(1) if average_attn_weights else weights
    return out if module.batch_first else out.transpose(0, 1), returned


def _project(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    stacked = module.in_proj_weight
    weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight) if stacked is None else stacked.chunk(3)
    biases = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return [F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases)]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts a bool mask (True is not attended to) to 0 and -inf; a mask of numbers is added unchanged."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask.to(dtype)
