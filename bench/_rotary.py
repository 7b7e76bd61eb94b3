"""What the rotary ops share: their least work, and other libraries' ways to do it.

Those take tables of cosines and sines, which a model makes once a forward pass, in the dtype that
its layers take, and shares between them: making them is not timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from _harness import MakeProvider, Provider, UnavailableError
from patchpack.testing.catalogue import SPECS, Inputs

RotaryPeer = Callable[[Tensor, Tensor, Inputs], Provider]  # of cos, sin [T, D / 2] in float32


def bytes_moved(inputs: Inputs, backward: bool) -> int:
    """Read q, k and tables or positions, write q and k; backward the same for gradients."""
    q, k = inputs["q"], inputs["k"]
    angles = [inputs[name].nbytes for name in ("cos", "sin", "position_ids") if name in inputs]
    heads = (q.numel() + k.numel()) * q.element_size()
    return (2 if backward else 1) * (2 * heads + sum(angles))


def flops(inputs: Inputs, backward: bool) -> int:
    """Two products and a sum for every channel; the heads of a token share its angles."""
    return (2 if backward else 1) * 3 * (inputs["q"].numel() + inputs["k"].numel())


def transformers_vision(cos: Tensor, sin: Tensor, inputs: Inputs) -> Provider:
    """Eager, in float32."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision  # pyright: ignore[reportMissingImports]

    cos, sin = _for_halves(cos, sin, inputs)
    return lambda q, k, **_: apply_rotary_pos_emb_vision(q, k, cos, sin)


def transformers_text(cos: Tensor, sin: Tensor, inputs: Inputs) -> Provider:
    """Eager, in the dtype of the heads."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb  # pyright: ignore[reportMissingImports]

    cos, sin = _for_halves(cos, sin, inputs, inputs["q"].dtype)
    return lambda q, k, **_: apply_rotary_pos_emb(q, k, cos, sin)


def liger_vision(cos: Tensor, sin: Tensor, inputs: Inputs) -> Provider:
    """One Triton launch for both, of copies in float32."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb_vision  # pyright: ignore[reportMissingImports]

    cos, sin = _for_halves(cos, sin, inputs)
    return lambda q, k, **_: liger_rotary_pos_emb_vision(q, k, cos, sin)


def liger_text(cos: Tensor, sin: Tensor, inputs: Inputs) -> Provider:
    """One Triton launch for both; sections are read from tables of three axes, if there are any."""
    from liger_kernel.transformers.qwen2vl_mrope import liger_multimodal_rotary_pos_emb  # pyright: ignore[reportMissingImports]
    from liger_kernel.transformers.rope import liger_rotary_pos_emb  # pyright: ignore[reportMissingImports]

    cos, sin = (x[None] for x in _for_halves(cos, sin, inputs, inputs["q"].dtype))
    turn = liger_rotary_pos_emb
    if not inputs.get("mrope_interleaved"):
        cos, sin = (x.repeat(3, 1, 1, 1) for x in (cos, sin))
        section = inputs["mrope_section"]
        turn = lambda *args: liger_multimodal_rotary_pos_emb(*args, section)  # noqa: E731

    def rotate(q: Tensor, k: Tensor, **_) -> list[Tensor]:
        both = turn(*(x.transpose(0, 1)[None] for x in (q, k)), cos, sin)
        return [x[0].transpose(0, 1) for x in both]

    return rotate


def flash_attn(cos: Tensor, sin: Tensor, inputs: Inputs) -> Provider:
    """One Triton launch for each."""
    from flash_attn.layers.rotary import apply_rotary_emb  # pyright: ignore[reportMissingImports]

    interleaved = inputs.get("interleaved", False)
    cos, sin = (x.to(inputs["q"].dtype) for x in (cos, sin))

    def rotate(q: Tensor, k: Tensor, **_) -> list[Tensor]:
        return [apply_rotary_emb(x[None], cos, sin, interleaved)[0] for x in (q, k)]

    return rotate


def complex_product(cos: Tensor, sin: Tensor, inputs: Inputs) -> Provider:
    """Eager, pairs read as complex numbers: MoonViT's way."""
    if not inputs.get("interleaved"):
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


def _for_halves(
    cos: Tensor, sin: Tensor, inputs: Inputs, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Tables ``[T, D]`` for channels that are half a head apart."""
    if inputs.get("interleaved"):
        raise UnavailableError("it turns channels that are half a head apart only")
    return tuple(x.repeat(1, 2).to(dtype) for x in (cos, sin))


def peers(
    op: str, transformers: RotaryPeer = transformers_vision, liger: RotaryPeer = liger_vision
) -> dict[str, MakeProvider]:
    """The peers of a rotary op."""
    libraries: dict[str, RotaryPeer] = {
        "transformers": transformers,
        "transformers, compiled": lambda *table: _compiled(transformers(*table)),
        "complex product": complex_product,
        "Liger": liger,
        "flash-attn": flash_attn,
    }

    def prepared(peer: RotaryPeer) -> MakeProvider:
        return lambda inputs: peer(*table(op, inputs), inputs)

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
