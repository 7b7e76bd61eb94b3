"""What the rotary ops share: their least work, and other libraries' ways to do it.

Those take tables of cosines and sines, which a model makes once a forward pass and shares between
its layers: making them is not timed. A library that is not installed raises ``ImportError``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from _harness import MakeProvider, Provider, UnavailableError
from patchpack.testing.catalogue import SPECS, Inputs

RotaryPeer = Callable[[Tensor, Tensor, bool], Provider]  # of cos, sin [T, D / 2], interleaved


def bytes_moved(inputs: Inputs, backward: bool) -> int:
    """Read q, k and tables or positions, write q and k; backward the same for gradients."""
    q, k = inputs["q"], inputs["k"]
    angles = [inputs[name].nbytes for name in ("cos", "sin", "position_ids") if name in inputs]
    heads = (q.numel() + k.numel()) * q.element_size()
    return (2 if backward else 1) * (2 * heads + sum(angles))


def flops(inputs: Inputs, backward: bool) -> int:
    """Two products and a sum for every channel; the heads of a token share its angles."""
    return (2 if backward else 1) * 3 * (inputs["q"].numel() + inputs["k"].numel())


def transformers_vision(cos: Tensor, sin: Tensor, interleaved: bool) -> Provider:
    """Eager, in float32."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision  # pyright: ignore[reportMissingImports]

    _halves_only(interleaved)
    cos, sin = cos.repeat(1, 2), sin.repeat(1, 2)
    return lambda q, k, **_: apply_rotary_pos_emb_vision(q, k, cos, sin)


def transformers_text(cos: Tensor, sin: Tensor, interleaved: bool) -> Provider:
    """Eager, in the dtype of the heads."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb  # pyright: ignore[reportMissingImports]

    _halves_only(interleaved)
    cos, sin = cos.repeat(1, 2), sin.repeat(1, 2)

    def rotate(q: Tensor, k: Tensor, **_) -> tuple[Tensor, ...]:
        return apply_rotary_pos_emb(q, k, cos.to(q.dtype), sin.to(q.dtype))

    return rotate


def liger(cos: Tensor, sin: Tensor, interleaved: bool) -> Provider:
    """One Triton launch for both."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb_vision  # pyright: ignore[reportMissingImports]

    _halves_only(interleaved)
    cos, sin = cos.repeat(1, 2), sin.repeat(1, 2)
    return lambda q, k, **_: liger_rotary_pos_emb_vision(q, k, cos, sin)


def flash_attn(cos: Tensor, sin: Tensor, interleaved: bool) -> Provider:
    """One Triton launch for each."""
    from flash_attn.layers.rotary import apply_rotary_emb  # pyright: ignore[reportMissingImports]

    def rotate(q: Tensor, k: Tensor, **_) -> tuple[Tensor, ...]:
        tables = cos.to(q.dtype), sin.to(q.dtype)
        return tuple(apply_rotary_emb(x[None], *tables, interleaved)[0] for x in (q, k))

    return rotate


def complex_product(cos: Tensor, sin: Tensor, interleaved: bool) -> Provider:
    """Eager, pairs read as complex numbers: MoonViT's way."""
    if not interleaved:
        raise UnavailableError("it turns adjacent channels only")
    turn = torch.complex(cos, sin)[:, None]  # [T, 1, D / 2]

    def rotate(q: Tensor, k: Tensor, **_) -> tuple[Tensor, ...]:
        pairs = (torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) for x in (q, k))
        return tuple(torch.view_as_real(x * turn).flatten(-2).to(q.dtype) for x in pairs)

    return rotate


def _compiled(provider: Provider) -> Provider:
    torch._dynamo.reset()
    rotate = torch.compile(lambda q, k: provider(q=q, k=k), dynamic=False)
    return lambda q, k, **_: rotate(q, k)


def _halves_only(interleaved: bool) -> None:
    if interleaved:
        raise UnavailableError("it turns channels that are half a head apart only")


def peers(op: str, transformers: RotaryPeer = transformers_vision) -> dict[str, MakeProvider]:
    """The peers of a rotary op."""
    libraries: dict[str, RotaryPeer] = {
        "transformers": transformers,
        "transformers, compiled": lambda *table: _compiled(transformers(*table)),
        "complex product": complex_product,
        "Liger": liger,
        "flash-attn": flash_attn,
    }

    def prepared(peer: RotaryPeer) -> MakeProvider:
        return lambda inputs: peer(*table(op, inputs), inputs.get("interleaved", False))

    return {name: prepared(peer) for name, peer in libraries.items()}


def table(op: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[T, D / 2]``: what the op makes of unit vectors."""
    q = inputs["q"]
    unit = q.new_zeros(q.shape[0], 1, q.shape[2], dtype=torch.float32)
    half = q.shape[2] // 2
    first, second = slice(half), slice(half, None)
    if inputs.get("interleaved"):
        first, second = slice(0, None, 2), slice(1, None, 2)
    unit[..., first] = 1
    turned = SPECS[op].reference(**{**inputs, "q": unit, "k": unit})[0][:, 0]
    return turned[:, first].contiguous(), turned[:, second].contiguous()
