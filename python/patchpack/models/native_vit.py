"""``NativeViT``: a vision transformer that takes every image at its own resolution.

The images of a batch are one packed sequence of patches. Nothing here knows where an image begins
or ends but the ``PackedGrid``, which ``rope_2d`` and ``varlen_attention`` read on the device: there
is no padding, no mask, no loop over images and no wait for the device.

With its defaults this is the encoder of Qwen2-VL (arXiv 2409.12191). Parameters are named as in
transformers, whose weights fit once ``patch_embed.proj.weight`` is flattened to ``[C, P]``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Integral

import torch
from torch import Tensor, nn

from patchpack import PackedGrid, _check, rope_2d, varlen_attention

NORM_EPS = 1e-6


@dataclass(frozen=True)
class NativeViTConfig:
    """Sizes of a ``NativeViT``; the defaults are Qwen2-VL-7B's.

    Attributes:
        patch_size: Side of a patch, in pixels.
        temporal_patch_size: Frames to a patch.
        in_channels: Channels of a pixel.
        hidden_size: ``C``, channels of a token.
        depth: Number of blocks.
        num_heads: ``H``; the head size ``C / H`` divides by 4 and is 128 at most.
        mlp_ratio: Hidden channels of a block's MLP, over ``C``.
        spatial_merge_size: ``m``; blocks of ``m x m`` tokens leave as one.
        out_size: Channels of a token that leaves, those of the language model.
        rope_base: Wavelength base of the rotary embedding.
        rope_axes: Which channels turn with the row: see ``patchpack.rope_2d``.
        rope_interleaved: Which channels turn together: see ``patchpack.rope_2d``.

    Raises:
        ValueError: A size is not positive (``depth`` may be 0), ``hidden_size`` does not give
            ``num_heads`` heads whose size divides by 4 and is 128 at most, or ``rope_axes`` is
            unknown.
        TypeError: A size is not a number, or not an integer where it is no ratio or base.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    in_channels: int = 3
    hidden_size: int = 1280
    depth: int = 32
    num_heads: int = 16
    mlp_ratio: float = 4.0
    spatial_merge_size: int = 2
    out_size: int = 3584
    rope_base: float = 10_000.0
    rope_axes: str = "split"
    rope_interleaved: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "float":
                _check.positive(field.name, value)
            elif field.type == "int":
                if isinstance(value, bool) or not isinstance(value, Integral):
                    raise TypeError(f"{field.name} must be an integer, got {value!r}")
                least = 0 if field.name == "depth" else 1
                if value < least:
                    raise ValueError(f"{field.name} must be at least {least}, got {value}")
        _check.one_of("rope_axes", self.rope_axes, ("split", "even_odd", "paired"))
        _check.flags(rope_interleaved=self.rope_interleaved)
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size must divide by 4 * num_heads = {4 * self.num_heads},"
                f" got {self.hidden_size}"
            )
        if self.hidden_size // self.num_heads > 128:
            raise ValueError(
                f"hidden_size must be at most 128 * num_heads = {128 * self.num_heads},"
                f" got {self.hidden_size}"
            )
        if self.mlp_size < 1:
            raise ValueError(f"mlp_ratio must give at least 1 channel, got {self.mlp_ratio}")

    @property
    def mlp_size(self) -> int:
        """Hidden channels of a block's MLP."""
        return round(self.hidden_size * self.mlp_ratio)

    @property
    def patch_dim(self) -> int:
        """``P``, numbers in a patch: channels, frames, rows and columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel is a matrix product."""

    def __init__(self, config: NativeViTConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.patch_dim, config.hidden_size, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels.to(self.proj.weight.dtype))  # [T, C]


class Attention(nn.Module):
    """Every image attends to itself alone."""

    def __init__(self, config: NativeViTConfig) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, grid: PackedGrid, impl: str | None) -> Tensor:
        config = self.config
        qkv = self.qkv(x).unflatten(1, (3, config.num_heads, -1))
        q, k, v = qkv.unbind(1)  # [T, H, D] each, views
        q, k = rope_2d(
            q,
            k,
            grid,
            base=config.rope_base,
            interleaved=config.rope_interleaved,
            axes=config.rope_axes,
            impl=impl,
        )
        return self.proj(varlen_attention(q, k, v, grid.cu_seqlens, impl=impl).flatten(1))


class Mlp(nn.Module):
    def __init__(self, config: NativeViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_size)
        self.fc2 = nn.Linear(config.mlp_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # the quick GELU


class Block(nn.Module):
    def __init__(self, config: NativeViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.attn = Attention(config)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, grid: PackedGrid, impl: str | None) -> Tensor:
        x = x + self.attn(self.norm1(x), grid, impl)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Makes one token of ``m x m``: they are neighbours in the sequence, so that is a view."""

    def __init__(self, config: NativeViTConfig) -> None:
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width),
            nn.GELU(),
            nn.Linear(self.width, config.out_size),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.width))  # [T / m^2, out_size]


class NativeViT(nn.Module):
    """A native-resolution vision transformer: patches in, tokens for a language model out.

    Args:
        config: Its sizes.
        impl: How its ops run: ``"triton"``, ``"native"`` or ``"reference"``; by default that of the
            device. An attribute, which may change at any time: the weights are the same.

    Attributes:
        config: As given.
        impl: As given.
    """

    def __init__(self, config: NativeViTConfig, *, impl: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.impl = impl
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.merger = Merger(config)

    def forward(self, pixels: Tensor, grid: PackedGrid) -> Tensor:
        """Encode packed images.

        Args:
            pixels: Patches, ``[T, P]``, floating; each holds its channels, frames, rows and
                columns in this order, as ``systems.qwen2_vl.preprocess`` gives them.
            grid: Which images the ``T`` patches are, in merge-block order, on their device.

        Returns:
            Tokens ``[T / m^2, out_size]``, in the raster order of ``grid.merged()``, in the dtype
            of the weights. Differentiable in ``pixels`` and the weights.

        Raises:
            ValueError: A shape, a device, the merge size of ``grid`` or ``impl`` does not fit.
            TypeError: An argument has the wrong type.
        """
        config = self.config
        _check.shape("pixels", pixels, None, config.patch_dim)
        if not pixels.is_floating_point():
            raise TypeError(f"pixels must be floating, got {pixels.dtype}")
        _check.grid_of("pixels", pixels, grid)
        if grid.spatial_merge_size != config.spatial_merge_size:
            raise ValueError(
                f"grid must have spatial_merge_size={config.spatial_merge_size},"
                f" got {grid.spatial_merge_size}"
            )
        x = self.patch_embed(pixels)
        for block in self.blocks:
            x = block(x, grid, self.impl)
        return self.merger(x)
