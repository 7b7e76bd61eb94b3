"""``NativeViT``: a vision transformer that takes every image at its own resolution.

The images of a batch are one packed sequence of patches. Nothing here knows where an image begins
or ends but the ``PackedGrid``, which the ops read on the device: there is no padding, no mask, no
loop over images and no wait for the device. An image cut into tiles is as many grids.

With its defaults this is the encoder of Qwen2-VL (arXiv 2409.12191); ``CONFIGS`` has those of the
other systems. Parameters are named as Qwen2-VL's and Qwen2.5-VL's in transformers, whose weights
fit once ``patch_embed.proj.weight`` is flattened to ``[C, P]``. Of the others, the position that
InternVL adds to its class token is part of ``class_token``; MoonViT's embedding of time and mean
over frames are in ``systems.moonvit``, and SigLIP 2's pooling in ``systems.siglip2``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from patchpack import (
    PackedGrid,
    _check,
    add_pos_embed,
    merge_tokens,
    metadata,
    rope,
    rope_2d,
    scatter_tokens,
    varlen_attention,
)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,  # by a name, with which an encoder is pickled
    "swiglu": F.silu,
}
NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


@dataclass(frozen=True)
class NativeViTConfig:
    """Sizes and options of a ``NativeViT``; the defaults are Qwen2-VL-7B's.

    Attributes:
        patch_size: Side of a patch, in pixels.
        temporal_patch_size: Frames to a patch.
        in_channels: Channels of a pixel.
        patch_bias: Whether the patch embedding has a bias.
        hidden_size: ``C``, channels of a token.
        depth: Number of blocks.
        num_heads: ``H``; the head size ``C / H`` divides by 4 and is 128 at most.
        mlp_ratio: Hidden channels of a block's MLP, over ``C``.
        activation: Of a block's MLP: ``"gelu"``, ``"gelu_tanh"``, ``"quick_gelu"`` or ``"swiglu"``.
        norm: ``"layer"`` or ``"rms"``.
        norm_eps: What norms add to the variance.
        qkv_bias: Whether queries, keys and values have a bias.
        bias: Whether the other matrices of a block have one.
        qk_norm: Normalise queries and keys, all heads together, by their root mean square.
        layer_scale: Multiply what a block adds by learned factors, one a channel.
        pre_norm: Normalise before the first block.
        post_norm: Normalise after the last one.
        class_token: Put a learned token in front of every attention segment, for the blocks alone.
        pos_table: Rows and columns of a learned table of positions, resized to every grid and added
            to the patches; ``None`` for none, and the other ``pos_`` options change nothing.
        pos_mode: How it is resized: see ``patchpack.add_pos_embed``.
        pos_align_corners: Likewise.
        pos_antialias: Likewise.
        rope_axes: Which channels turn with the row: see ``patchpack.rope_2d``; ``None`` for no
            rotary embedding, and the other ``rope_`` options change nothing.
        rope_base: Its wavelength base.
        rope_interleaved: Which channels turn together: see ``patchpack.rope_2d``.
        window_size: Side of the square windows that tokens attend within, in pixels; ``None`` for
            whole frames.
        full_attention_blocks: Blocks, counted from 0, that attend to whole frames all the same.
        deepstack_blocks: Blocks, in ascending order, whose tokens leave as well, each through a
            merger of its own.
        spatial_merge_size: ``m``; blocks of ``m x m`` tokens leave as one.
        merge_order: ``"row"`` or ``"column"``: see ``patchpack.merge_tokens``.
        merger_norm: ``"tokens"`` normalises what is merged, ``"merged"`` what it becomes; ``None``
            neither.
        merger_size: Hidden channels of the merger; by default all that it merges, ``C m^2``.
        out_size: Channels of a token that leaves, those of the language model; ``None`` for no
            merger: patches leave, in their order.

    Raises:
        ValueError: A size is not positive (``depth`` may be 0), an option is unknown, or options do
            not go together.
        TypeError: A value has the wrong type.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    in_channels: int = 3
    patch_bias: bool = False
    hidden_size: int = 1280
    depth: int = 32
    num_heads: int = 16
    mlp_ratio: float = 4.0
    activation: str = "quick_gelu"
    norm: str = "layer"
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    bias: bool = True
    qk_norm: bool = False
    layer_scale: bool = False
    pre_norm: bool = False
    post_norm: bool = False
    class_token: bool = False
    pos_table: tuple[int, int] | None = None
    pos_mode: str = "bilinear"
    pos_align_corners: bool = False
    pos_antialias: bool = False
    rope_axes: str | None = "split"
    rope_base: float = 10_000.0
    rope_interleaved: bool = False
    window_size: int | None = None
    full_attention_blocks: tuple[int, ...] = ()
    deepstack_blocks: tuple[int, ...] = ()
    spatial_merge_size: int = 2
    merge_order: str = "row"
    merger_norm: str | None = "tokens"
    merger_size: int | None = None
    out_size: int | None = 3584

    def __post_init__(self) -> None:
        for field in fields(self):
            kind, _, optional = str(field.type).partition(" | ")
            if optional and getattr(self, field.name) is None:
                continue
            value = getattr(self, field.name)
            if kind == "float":
                _check.positive(field.name, value)
            elif kind == "bool":
                _check.flags(**{field.name: value})
            elif kind == "int":
                _check.whole(0 if field.name == "depth" else 1, **{field.name: value})
            elif kind.startswith("tuple"):
                _check.integers(field.name, value)
            elif field.name in OPTIONS:
                _check.one_of(field.name, value, OPTIONS[field.name])
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
        if self.pos_table is not None and (len(self.pos_table) != 2 or min(self.pos_table) < 1):
            raise ValueError(f"pos_table must be rows and columns, got {self.pos_table}")
        if self.class_token and (self.rope_axes is not None or self.window_size is not None):
            raise ValueError(
                "class_token has no place in the image: rope_axes and window_size must be None,"
                f" got {self.rope_axes!r} and {self.window_size}"
            )
        if self.window_size is not None and self.rope_axes not in (None, "split"):
            raise ValueError(
                f"rope_axes must be 'split' or None with windows, got {self.rope_axes!r}"
            )
        least = self.patch_size * self.spatial_merge_size
        if self.window_size is not None and self.window_size < least:
            raise ValueError(
                f"window_size must be at least patch_size * spatial_merge_size = {least},"
                f" got {self.window_size}"
            )
        if self.full_attention_blocks and self.window_size is None:
            raise ValueError(
                "full_attention_blocks must be empty without window_size,"
                f" got {self.full_attention_blocks}"
            )
        for name in ("full_attention_blocks", "deepstack_blocks"):
            blocks = list(getattr(self, name))
            if blocks != sorted(set(blocks) & set(range(self.depth))):
                raise ValueError(
                    f"{name} must be in ascending order, from 0 and below depth = {self.depth},"
                    f" got {getattr(self, name)}"
                )

    @property
    def mlp_size(self) -> int:
        """Hidden channels of a block's MLP."""
        return round(self.hidden_size * self.mlp_ratio)

    @property
    def patch_dim(self) -> int:
        """``P``, numbers in a patch: channels, frames, rows and columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


OPTIONS = {
    "activation": ACTIVATIONS,
    "norm": NORMS,
    "pos_mode": ("bilinear", "bicubic"),
    "rope_axes": ("split", "even_odd", "paired"),
    "merge_order": ("row", "column"),
    "merger_norm": ("tokens", "merged"),
}

_SO400M = {
    "hidden_size": 1152,
    "depth": 27,
    "mlp_ratio": 4304 / 1152,
    "activation": "gelu_tanh",
    "temporal_patch_size": 1,
    "patch_bias": True,
}
# the encoders of the released checkpoints; what follows those without out_size is in their systems
CONFIGS = {
    "internvl": NativeViTConfig(  # InternViT-6B-448px-V1-5, in InternVL-Chat-V1-5
        temporal_patch_size=1,
        patch_bias=True,
        hidden_size=3200,
        depth=45,
        num_heads=25,
        activation="gelu",
        norm="rms",
        qkv_bias=False,
        qk_norm=True,
        layer_scale=True,
        class_token=True,
        pos_table=(32, 32),
        pos_mode="bicubic",
        rope_axes=None,
        out_size=None,
    ),
    "llava_onevision": NativeViTConfig(  # SigLIP-so400m without its last block
        **{**_SO400M, "depth": 26},
        pos_table=(27, 27),
        rope_axes=None,
        spatial_merge_size=1,
        out_size=None,
    ),
    "oryx": NativeViTConfig(  # OryxViT
        **{**_SO400M, "activation": "gelu"},
        patch_size=16,
        pos_table=(128, 128),
        rope_axes=None,
        spatial_merge_size=1,
        out_size=None,
    ),
    "qwen2_vl": NativeViTConfig(),
    "qwen2_5_vl": NativeViTConfig(  # 7B
        mlp_ratio=3420 / 1280,
        activation="swiglu",
        norm="rms",
        window_size=112,
        full_attention_blocks=(7, 15, 23, 31),
    ),
    "qwen3_vl": NativeViTConfig(  # 8B
        **{**_SO400M, "temporal_patch_size": 2},
        patch_size=16,
        pos_table=(48, 48),
        pos_align_corners=True,
        deepstack_blocks=(8, 16, 24),
        out_size=4096,
    ),
    "siglip2": NativeViTConfig(  # so400m-patch16-naflex
        **_SO400M,
        patch_size=16,
        post_norm=True,
        pos_table=(16, 16),
        pos_antialias=True,
        rope_axes=None,
        spatial_merge_size=1,
        out_size=None,
    ),
    "moonvit": NativeViTConfig(  # Kimi-VL-A3B
        **_SO400M,
        norm_eps=1e-5,
        post_norm=True,
        pos_table=(64, 64),
        pos_mode="bicubic",
        rope_axes="paired",
        rope_interleaved=True,
        out_size=2048,
    ),
    "pixtral": NativeViTConfig(  # 12B, in the layout of transformers
        patch_size=16,
        temporal_patch_size=1,
        hidden_size=1024,
        depth=24,
        activation="swiglu",
        norm="rms",
        norm_eps=1e-5,
        qkv_bias=False,
        bias=False,
        pre_norm=True,
        rope_axes="even_odd",
        spatial_merge_size=1,
        merger_norm=None,
        merger_size=5120,
        out_size=5120,
    ),
}


def _norm(config: NativeViTConfig, size: int) -> nn.Module:
    return NORMS[config.norm](size, eps=config.norm_eps)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel is a matrix product."""

    def __init__(self, config: NativeViTConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.patch_dim, config.hidden_size, bias=config.patch_bias)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels.to(self.proj.weight.dtype))  # [T, C]


@dataclass(frozen=True)
class Tokens:
    """What the blocks know of the packed sequence: where its tokens stand, and their segments."""

    grid: PackedGrid
    cu_seqlens: Tensor  # of frames
    cu_windows: Tensor | None = None
    table: tuple[Tensor, Tensor] | None = None  # cosines and sines, of tokens ordered by window
    patches: Tensor | None = None  # where those of the grid stand, if elsewhere

    def of_grid(self, x: Tensor) -> Tensor:
        """The patches of ``x`` in the order of the grid."""
        return x if self.patches is None else x[self.patches]


class Attention(nn.Module):
    """Every token attends to those of its segment alone."""

    def __init__(self, config: NativeViTConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.qkv = nn.Linear(size, 3 * size, bias=config.qkv_bias)
        self.proj = nn.Linear(size, size, bias=config.bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(size, eps=config.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, tokens: Tokens, whole: bool, impl: str | None) -> Tensor:
        config = self.config
        q, k, v = self.qkv(x).chunk(3, dim=1)
        if config.qk_norm:
            q, k = self.q_norm(q).type_as(v), self.k_norm(k).type_as(v)  # autocast widens norms
        q, k, v = (y.unflatten(1, (config.num_heads, -1)) for y in (q, k, v))  # [T, H, D], views
        if tokens.table is not None:
            q, k = rope(q, k, *tokens.table, interleaved=config.rope_interleaved, impl=impl)
        elif config.rope_axes is not None:
            q, k = rope_2d(
                q,
                k,
                tokens.grid,
                base=config.rope_base,
                interleaved=config.rope_interleaved,
                axes=config.rope_axes,
                impl=impl,
            )
        windows = None if whole else tokens.cu_windows
        cu_seqlens = tokens.cu_seqlens if windows is None else windows
        return self.proj(varlen_attention(q, k, v, cu_seqlens, impl=impl).flatten(1))


class Mlp(nn.Module):
    def __init__(self, config: NativeViTConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_size, bias=config.bias)
        self.fc2 = nn.Linear(config.mlp_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class GatedMlp(nn.Module):
    def __init__(self, config: NativeViTConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=config.bias)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=config.bias)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: NativeViTConfig) -> None:
        super().__init__()
        self.norm1 = _norm(config, config.hidden_size)
        self.norm2 = _norm(config, config.hidden_size)
        self.attn = Attention(config)
        self.mlp = (GatedMlp if config.activation == "swiglu" else Mlp)(config)
        self.ls1 = self.ls2 = 1.0
        if config.layer_scale:
            self.ls1 = nn.Parameter(torch.full((config.hidden_size,), 0.1))
            self.ls2 = nn.Parameter(torch.full((config.hidden_size,), 0.1))

    def forward(self, x: Tensor, tokens: Tokens, whole: bool, impl: str | None) -> Tensor:
        x = x + self.ls1 * self.attn(self.norm1(x), tokens, whole, impl)
        return x + self.ls2 * self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Makes one token of ``m x m``, in the channels of the language model."""

    def __init__(self, config: NativeViTConfig, norm: str | None) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size * config.spatial_merge_size**2
        hidden = config.merger_size or width
        if norm is not None:
            self.ln_q = _norm(config, width if norm == "merged" else config.hidden_size)
        self.norm = norm
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, config.out_size or width)
        )

    def forward(self, x: Tensor, grid: PackedGrid, impl: str | None) -> Tensor:
        merge = functools.partial(
            merge_tokens,
            grid=grid,
            order=self.config.merge_order,
            merge_size=self.config.spatial_merge_size,
            impl=impl,
        )
        if self.norm is None:
            x = merge(x)
        elif isinstance(self.ln_q, nn.LayerNorm):  # in the same pass
            x = merge(x, weight=self.ln_q.weight, bias=self.ln_q.bias, eps=self.ln_q.eps)
        else:
            x = merge(self.ln_q(x)) if self.norm == "tokens" else self.ln_q(merge(x))
        return self.mlp(x)  # [T / m^2, out_size]


class NativeViT(nn.Module):
    """A native-resolution vision transformer: patches in, tokens for a language model out.

    Args:
        config: Its sizes and options.
        impl: How its ops run: ``"triton"``, ``"native"`` or ``"reference"``; by default that of the
            device. An attribute, which may change at any time: the weights are the same.

    ``torch.compile`` takes it whole, and compiles at most twice for all batches. Where shapes have
    to stay the same, as in a CUDA graph, it takes a padded grid, and pixels with any finite rows
    behind those of the batch, whose tokens come first: see ``PackedGrid.padded``. ``torch.export``
    takes it with a grid as an input, and learns which sizes differ from a second batch, of another
    number of images, segments and tokens, and with another longest segment::

        inputs = torch.export.AdditionalInputs()
        inputs.add((other_pixels, other_grid))
        program = torch.export.export(model, (pixels, grid), dynamic_shapes=inputs)

    Under ``torch.autocast`` matrix products are narrow and norms wide, and every op runs in the
    dtype of what it gets.

    Attributes:
        config: As given.
        impl: As given.
    """

    def __init__(self, config: NativeViTConfig, *, impl: str | None = None) -> None:
        if not isinstance(config, NativeViTConfig):
            raise TypeError(f"config must be a NativeViTConfig, got {type(config).__name__}")
        super().__init__()
        self.config = config
        self.impl = impl
        self.patch_embed = PatchEmbed(config)
        if config.class_token:
            self.class_token = nn.Parameter(torch.randn(config.hidden_size) * 0.02)
        if config.pos_table is not None:
            self.pos_embed = nn.Parameter(torch.randn(*config.pos_table, config.hidden_size) * 0.02)
        if config.pre_norm:
            self.pre_norm = _norm(config, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        if config.post_norm:
            self.post_norm = _norm(config, config.hidden_size)
        if config.out_size is not None:
            self.merger = Merger(config, config.merger_norm)
        self.deepstack = nn.ModuleList(Merger(config, "merged") for _ in config.deepstack_blocks)

    def forward(self, pixels: Tensor, grid: PackedGrid) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Encode packed images.

        Args:
            pixels: Patches, ``[T, P]``, floating; each holds its channels, frames, rows and
                columns in this order, as ``patchpack.patchify`` gives them.
            grid: Which images or tiles the ``T`` patches are, in raster order or in merge-block
                order of ``m``, on their device.

        Returns:
            Tokens ``[T / m^2, out_size]``, those of a frame in raster order (or by column, as
            ``merge_order`` says), in the dtype of the weights; without a merger ``[T, C]`` in the
            order of ``grid``. With ``deepstack_blocks`` also a list of the tokens after each of
            them. Differentiable in ``pixels`` and the weights.

        Raises:
            ValueError: A shape, a device, the merge size of ``grid`` or ``impl`` does not fit.
            TypeError: An argument has the wrong type.
        """
        config, impl = self.config, self.impl
        _check.shape("pixels", pixels, None, config.patch_dim)
        if not pixels.is_floating_point():
            raise TypeError(f"pixels must be floating, got {pixels.dtype}")
        _check.grid_of("pixels", pixels, grid)
        m = config.spatial_merge_size
        if grid.spatial_merge_size not in ((m,) if config.window_size else (1, m)):
            raise ValueError(
                f"grid must have spatial_merge_size={m}, got {grid.spatial_merge_size}"
            )
        x = self.patch_embed(pixels)
        if config.pos_table is not None:
            x = add_pos_embed(
                x,
                self.pos_embed,
                grid,
                mode=config.pos_mode,
                align_corners=config.pos_align_corners,
                antialias=config.pos_antialias,
                impl=impl,
            )
        tokens = self._arranged(grid)
        if tokens.patches is not None:
            rows = x
            if config.class_token:
                rows = self.class_token.to(x.dtype).expand(x.shape[0] + grid.num_segments, -1)
            x = scatter_tokens(rows, x, tokens.patches, impl=impl)
        if config.pre_norm:
            x = self.pre_norm(x)

        features = []
        for i, block in enumerate(self.blocks):
            x = block(x, tokens, i in config.full_attention_blocks, impl)
            if i in config.deepstack_blocks:
                merger = self.deepstack[config.deepstack_blocks.index(i)]
                features.append(merger(tokens.of_grid(x), grid, impl))
        if config.post_norm:
            x = self.post_norm(x)
        x = tokens.of_grid(x)
        if config.out_size is not None:
            x = self.merger(x, grid, impl)
        return (x, features) if config.deepstack_blocks else x

    def _arranged(self, grid: PackedGrid) -> Tokens:
        """How the tokens stand while they pass the blocks."""
        config, device = self.config, grid.geometry.device
        if config.class_token:
            patch = torch.arange(grid.num_tokens, device=device)
            segment = torch.searchsorted(grid.cu_seqlens[1:].long(), patch, right=True)
            before = torch.arange(grid.num_segments + 1, dtype=torch.int32, device=device)
            place = patch + (segment + 1).clamp(max=grid.num_segments)  # padding has no segment
            return Tokens(grid, grid.cu_seqlens + before, patches=place)
        if config.window_size is None:
            return Tokens(grid, grid.cu_seqlens)
        m = config.spatial_merge_size
        blocks, cu_windows = self._windows(grid, config.window_size)
        order = (blocks[:, None] * m * m + torch.arange(m * m, device=device)).flatten()
        table = None
        if config.rope_axes is not None:
            pairs = config.hidden_size // config.num_heads // 4
            exponent = torch.arange(pairs, dtype=torch.float64, device=device) / pairs
            angle = grid.position_ids[order, :, None] * config.rope_base**-exponent
            table = angle.flatten(1).cos().float(), angle.flatten(1).sin().float()  # [T, D / 2]
        return Tokens(grid, grid.cu_seqlens, cu_windows, table, order.argsort())

    def _windows(self, grid: PackedGrid, window_size: int) -> tuple[Tensor, Tensor]:
        """Which block is at each place of windowed order, and where windows begin and end."""
        m, patch_size = self.config.spatial_merge_size, self.config.patch_size
        options = {"window_size": window_size, "patch_size": patch_size}
        if not torch.compiler.is_compiling() and grid.block_size is None:
            found = metadata.get_vision_window_index(grid.grid_thw, m, **options)
            blocks, bounds = (x.to(grid.geometry.device, non_blocking=True) for x in found)
            return blocks, bounds
        # shapes follow from those of the grid alone: there is room for all windows that can be
        first, rows, cols = grid.geometry.unbind(dim=1)  # [G + 1] each
        frames = first.diff() // (rows * cols)[:-1]
        grid_thw = torch.stack([frames, rows[:-1], cols[:-1]], dim=1)
        num_blocks = grid.num_tokens // m**2
        num_windows = num_blocks  # at least one block each, and
        if not grid.merge_temporal:  # a frame of n blocks has at most 1 + (n - 1) / side
            num_windows = grid.num_segments + num_blocks // (window_size // m // patch_size)
        options |= {"num_tokens": grid.num_tokens, "num_windows": num_windows}
        blocks, bounds = metadata.get_vision_window_index(grid_thw, m, **options)
        return blocks, torch.minimum(bounds, grid.cu_seqlens[-1])  # padding is in no window
