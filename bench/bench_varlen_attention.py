"""``varlen_attention`` of images, windows and text. Bound by matrix products."""

from __future__ import annotations

import functools
import importlib
import itertools
import types

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from _harness import PHOTOS, Bench, Floor, MakeProvider, Provider, UnavailableError, heads
from patchpack.testing.catalogue import Inputs


def _make_inputs(dtype, device, lengths, num_heads, head_dim, causal=False) -> Inputs:
    q, k, v = heads(sum(lengths), num_heads, head_dim, dtype, device)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens.to(device), "causal": causal}


def _lengths(inputs: Inputs) -> list[int]:
    return inputs["cu_seqlens_q"].diff().tolist()


def _bytes_moved(inputs: Inputs, backward: bool) -> int:
    """Read q, k, v and write out; then read those and grad_out, write three gradients."""
    q, kv = inputs["q"].numel(), inputs["k"].numel() + inputs["v"].numel()
    values = (q + kv + q) + (backward and (q + kv + q + q) + (q + kv))
    return values * inputs["q"].element_size()


def _flops(inputs: Inputs, backward: bool) -> int:
    """Two matrix products forward and five backward, of the pairs that see each other."""
    _, num_heads, head_dim = inputs["q"].shape
    causal = inputs["causal"]
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in _lengths(inputs))
    return (7 if backward else 2) * 2 * pairs * num_heads * head_dim


def _compiled(inputs: Inputs) -> Provider:
    raise UnavailableError("it would unroll the loop over segments and compile for minutes")


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """``[B, T, H, D]``"""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa).transpose(1, 2)


def _sdpa_loop(inputs: Inputs) -> Provider:
    lengths = _lengths(inputs)

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, **_) -> Tensor:
        qs, ks, vs = (x[None].split(lengths, dim=1) for x in (q, k, v))
        outs = [_sdpa(*segment, causal) for segment in zip(qs, ks, vs, strict=True)]
        return torch.cat(outs, dim=1)[0]

    return attend


def _eager_loop(inputs: Inputs) -> Provider:
    """As transformers splits and calls its eager attention: product, float32 softmax, product."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import eager_attention_forward  # pyright: ignore[reportMissingImports]

    q, k = inputs["q"], inputs["k"]
    lengths, scale = _lengths(inputs), q.shape[2] ** -0.5
    module = types.SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
    masks: dict[int, Tensor | None] = dict.fromkeys(lengths)
    if inputs["causal"]:
        for n in masks:
            masks[n] = torch.full((n, n), -torch.inf, dtype=q.dtype, device=q.device).triu(1)

    def attend(q: Tensor, k: Tensor, v: Tensor, **_) -> Tensor:
        qs, ks, vs = (x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v))
        outs = [
            eager_attention_forward(module, *segment, masks[segment[0].shape[2]], scale)[0]  # pyright: ignore[reportArgumentType]
            for segment in zip(qs, ks, vs, strict=True)
        ]
        return torch.cat(outs, dim=1)[0]

    return attend


def _sdpa_batch(inputs: Inputs) -> Provider:
    lengths = _lengths(inputs)
    if len(set(lengths)) > 1:
        raise UnavailableError("it needs segments of one length")

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, **_) -> Tensor:
        q, k, v = (x.unflatten(0, (len(lengths), -1)) for x in (q, k, v))
        return _sdpa(q, k, v, causal).flatten(0, 1)

    return attend


def _flex_attention(inputs: Inputs) -> Provider:
    """FlexAttention; its block mask is made once a batch and not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    num_tokens, device = inputs["q"].shape[0], inputs["q"].device
    lengths = torch.tensor(_lengths(inputs))
    segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)

    def visible(_b, _h, i, j):
        same = segment[i] == segment[j]
        return same & (i >= j) if inputs["causal"] else same

    mask = create_block_mask(visible, None, None, num_tokens, num_tokens, device=str(device))
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor, **_) -> Tensor:
        gqa = q.shape[1] != k.shape[1]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = compiled(q, k, v, block_mask=mask, enable_gqa=gqa)
        return out[0].transpose(0, 1)

    return attend


def _nested_sdpa(inputs: Inputs) -> Provider:
    """SDPA of jagged tensors; their least and largest length are told, not read back."""
    lengths = _lengths(inputs)
    least, longest = min(lengths), max(lengths)

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, causal: bool) -> Tensor:
        gqa = q.shape[1] != k.shape[1]
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(
                x, cu_seqlens_q, min_seqlen=least, max_seqlen=longest
            ).transpose(1, 2)
            for x in (q, k, v)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)
        return out.transpose(1, 2).values()

    return attend


def _torch_varlen(inputs: Inputs) -> Provider:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(_lengths(inputs))
    attention = varlen_attn
    if inputs["q"].shape[1] != inputs["k"].shape[1]:  # not every release has the option
        attention = functools.partial(varlen_attn, enable_gqa=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, causal: bool):
        window = (-1, 0 if causal else -1)
        return attention(q, k, v, cu_seqlens_q, cu_seqlens_q, longest, longest, window_size=window)

    return attend


def _flash_attn(module: str) -> MakeProvider:
    """A release of flash-attn: each is a module of its own, and some give the logsumexp too."""

    def make(inputs: Inputs) -> Provider:
        function = importlib.import_module(module).flash_attn_varlen_func
        longest = max(_lengths(inputs))

        def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, causal: bool) -> Tensor:
            out = function(
                *(q, k, v),
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k=cu_seqlens_q,
                max_seqlen_q=longest,
                max_seqlen_k=longest,
                causal=causal,
            )
            return out[0] if isinstance(out, tuple) else out

        return attend

    return make


VISION = {"num_heads": (16, 16), "head_dim": 80}
PACKED, WINDOWS, SMALL = "Qwen2-VL, 16 photos", "Qwen2.5-VL, 128 windows of 64", "512 windows of 16"

BENCH = Bench(
    op="varlen_attention",
    shapes={
        PACKED: {"lengths": [h * w for h, w in PHOTOS], **VISION},
        WINDOWS: {"lengths": [64] * 128, **VISION},
        SMALL: {"lengths": [16] * 512, **VISION},
        "Qwen2-VL-7B text, causal": {
            "lengths": [512, 3072, 1536],
            "num_heads": (28, 4),
            "head_dim": 128,
            "causal": True,
        },
    },
    large={
        "Qwen2-VL, 8 images 64x64": {"lengths": [4096] * 8, **VISION},
        "Qwen2.5-VL, 2048 windows of 64": {"lengths": [64] * 2048, **VISION},
        "InternVL, 64 tiles 32x32": {
            "lengths": [1025] * 64,
            "num_heads": (16, 16),
            "head_dim": 64,
        },
        "Qwen2-VL-7B text, causal, 4 x 8192": {
            "lengths": [8192] * 4,
            "num_heads": (28, 4),
            "head_dim": 128,
            "causal": True,
        },
    },
    tiny={"lengths": [5, 9, 2], "num_heads": (4, 2), "head_dim": 16},
    make_inputs=_make_inputs,
    bytes_moved=_bytes_moved,
    flops=_flops,
    bound="matmul",
    peers={
        "reference, compiled": _compiled,
        "SDPA loop": _sdpa_loop,
        "eager loop": _eager_loop,
        "SDPA of a batch": _sdpa_batch,
        "FlexAttention": _flex_attention,
        "torch varlen_attn": _torch_varlen,
        "nested SDPA": _nested_sdpa,
        "flash-attn": _flash_attn("flash_attn"),
        "flash-attn 3": _flash_attn("flash_attn_interface"),
        "flash-attn 4": _flash_attn("flash_attn.cute"),
    },
    floors=(
        Floor(PACKED, "float32", "forward", "matmul", 0.85),
        Floor(PACKED, "bfloat16", "forward", "eager loop", 1.8),
        Floor(PACKED, "bfloat16", "forward+backward", "eager loop", 1.6),
        Floor(WINDOWS, "bfloat16", "forward+backward", "SDPA loop", 4),
        Floor(SMALL, "bfloat16", "forward+backward", "SDPA loop", 10),
    ),
)
