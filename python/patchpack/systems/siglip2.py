"""SigLIP 2 NaFlex: one encoder at any resolution and aspect, within a budget of patches.

In the order of the model: the largest size that fits the budget (``image_size``, ``plan``), patches
(``preprocess``), a table of positions resized to each image (``Embeddings``), and, after the
transformer, one vector an image (``PoolingHead``).

transformers pads every image to the budget and masks the rest; here images are packed one after the
other, and nothing is padded.

Source: Tschannen et al., "SigLIP 2: Multilingual Vision-Language Encoders with Improved Semantic
Understanding, Localization, and Dense Features", arXiv 2502.14786, with the behaviour of the
Siglip2 classes of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from patchpack import _check, add_pos_embed, varlen_attention
from patchpack.packing import PackedGrid
from patchpack.systems import _images, _plan

if TYPE_CHECKING:
    from patchpack.systems._images import Image

MEAN = STD = (0.5, 0.5, 0.5)

# scales that the search tries, and how near it comes
LEAST_SCALE, MOST_SCALE, SCALE_STEP = 1e-6, 100.0, 1e-5


# Resolution and aspect ---------------------------------------------------------------------------


def image_size(
    height: int, width: int, *, patch_size: int = 16, max_num_patches: int = 256
) -> tuple[int, int]:
    """The size an image is resized to: as many patches as the budget allows, about its aspect.

    Both sides are scaled by one factor of at most 100 and rounded up to whole patches. The factor
    is found by bisection, whose end is the original's to the bit.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        patch_size: Side of a patch, in pixels.
        max_num_patches: Most patches.

    Returns:
        Height and width after resizing, in pixels, multiples of ``patch_size``.

    Raises:
        ValueError: A number is not positive, or the sides are too long for any scale.
        TypeError: A number is not an integer.
    """
    height, width, patch_size, max_num_patches = _check.whole(
        height=height, width=width, patch_size=patch_size, max_num_patches=max_num_patches
    )

    def patches(scale: float) -> tuple[int, int]:
        rows, cols = (max(1, math.ceil(side * scale / patch_size)) for side in (height, width))
        return rows, cols

    low, high = LEAST_SCALE, MOST_SCALE
    while high - low >= SCALE_STEP:
        scale = (low + high) / 2
        if math.prod(patches(scale)) <= max_num_patches:
            low = scale
        else:
            high = scale
    rows, cols = patches(low)
    if rows * cols > max_num_patches:
        raise ValueError(
            f"height and width must fit into max_num_patches={max_num_patches} at a scale of"
            f" {LEAST_SCALE}, got {height} x {width}"
        )
    return rows * patch_size, cols * patch_size


@dataclass(frozen=True)
class Plan(_plan.Plan):
    """What becomes of one image.

    Attributes:
        height: Height before resizing, in pixels.
        width: Width before resizing, in pixels.
        resized: Height and width after resizing, in pixels.
        patch_size: Side of a patch, in pixels.
        frame_indices: Always ``None``: the model takes no video.
    """

    height: int
    width: int
    resized: tuple[int, int]
    patch_size: int = 16
    frame_indices: None = None

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        rows, cols = (side // self.patch_size for side in self.resized)
        return ((1, rows, cols),)

    @property
    def llm_tokens(self) -> int:
        """Tokens that the encoder gives, one a patch; it has no language model of its own."""
        return self.vit_tokens

    @property
    def markup_tokens(self) -> int:
        """None."""
        return 0


def plan(height: int, width: int, *, patch_size: int = 16, max_num_patches: int = 256) -> Plan:
    """Plan one image. A 640 x 480 image takes 252 of 256 patches.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        patch_size: Side of a patch, in pixels.
        max_num_patches: Most patches.

    Returns:
        The plan.

    Raises:
        ValueError: ``image_size`` refuses a number.
        TypeError: A number is not an integer.
    """
    height, width, patch_size = _check.whole(height=height, width=width, patch_size=patch_size)
    resized = image_size(height, width, patch_size=patch_size, max_num_patches=max_num_patches)
    return Plan(height, width, resized, patch_size)


# Patches -----------------------------------------------------------------------------------------


def _default_plan(num_frames: int | None, height: int, width: int) -> Plan:
    if num_frames is not None:
        raise ValueError(f"images must be single images, got a video of {num_frames} frames")
    return plan(height, width)


def preprocess(
    images: Iterable[Image],
    plans: Iterable[Plan] | None = None,
    *,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, PackedGrid]:
    """Images of different sizes to one packed sequence of normalised patches, without padding.

    Each image becomes 8-bit RGB (transparency on white), is resized with Pillow's bilinear filter,
    scaled to 0..1, normalised, and cut into patches. Runs on the host and needs Pillow, of the
    extra ``demo``.

    Args:
        images: Images: a Pillow image with 8 bits a channel, a NumPy array ``[height, width,
            channels]`` or ``[height, width]``, or a CPU tensor ``[channels, height, width]`` or
            ``[height, width]``, with 1, 3 or 4 channels, uint8, or floating in 0..1 and then
            rounded to 8 bits.
        plans: What becomes of each; by default ``plan`` of its size.
        mean: Mean of each channel, in 0..1.
        std: Standard deviation of each channel, likewise.
        dtype: Dtype of the patches, floating; computed in float32 and rounded once.

    Returns:
        The patches, ``[T, patch_size**2 * 3]`` on the CPU, whose columns run over row, column and
        channel, and their grid, in raster order.

    Raises:
        ValueError: An image does not fit its plan or the shapes above, floats leave 0..1, plans
            differ in their patch size, or their number is not that of images, or ``mean`` or
            ``std`` does not fit.
        TypeError: An image, a plan or ``dtype`` is of no kind listed above, or ``images`` or
            ``plans`` is one alone.
    """
    clips, plans = _images.clips_of(images, plans, Plan, _default_plan)
    patch_size = _plan.shared(plans, "patch_size", 16)
    grid = PackedGrid([g for p in plans for g in p.grids])
    pixels = _images.resized_patches(
        clips,
        grid,
        patch_size=patch_size,
        mode="bilinear",
        mean=mean,
        std=std,
        layout="ppc",
        dtype=dtype,
    )
    return pixels, grid


# Positions and pooling ---------------------------------------------------------------------------


class Embeddings(nn.Module):
    """Patches to tokens, with a learned table of positions resized to every image.

    Parameters are named as in transformers.

    Args:
        channels: ``C``, channels of a token.
        patch_size: Side of a patch, in pixels.
        table_side: Rows and columns of the table, in patches.
        impl: ``"triton"``, ``"native"`` or ``"reference"``; by default that of the device. An
            attribute, which may change at any time.

    Raises:
        ValueError: A size is not positive.
        TypeError: A size is not an integer.
    """

    def __init__(
        self,
        channels: int = 768,
        patch_size: int = 16,
        table_side: int = 16,
        *,
        impl: str | None = None,
    ) -> None:
        channels, patch_size, table_side = _check.whole(
            channels=channels, patch_size=patch_size, table_side=table_side
        )
        super().__init__()
        self.impl = impl
        self.patch_embedding = nn.Linear(3 * patch_size**2, channels)
        self.position_embedding = nn.Embedding(table_side**2, channels)

    def forward(self, pixels: Tensor, grid: PackedGrid) -> Tensor:
        """Embed ``pixels`` ``[T, 3 * patch_size**2]``, as ``preprocess`` gives them: ``[T, C]``."""
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))
        side = math.isqrt(self.position_embedding.num_embeddings)
        table = self.position_embedding.weight.unflatten(0, (side, side))
        return add_pos_embed(x, table, grid, antialias=True, impl=self.impl)


class PoolingHead(nn.Module):
    """One vector an image: a learned query attends to its tokens.

    Parameters are named as in transformers.

    Args:
        channels: ``C``, channels of a token.
        num_heads: ``H``; the head size ``C / H`` is 128 at most.
        mlp_size: Hidden channels of its MLP.
        impl: As in ``Embeddings``.

    Raises:
        ValueError: A size is not positive, or ``channels`` does not divide by ``num_heads``.
        TypeError: A size is not an integer.
    """

    def __init__(
        self,
        channels: int = 768,
        num_heads: int = 12,
        mlp_size: int = 3072,
        *,
        impl: str | None = None,
    ) -> None:
        channels, num_heads, mlp_size = _check.whole(
            channels=channels, num_heads=num_heads, mlp_size=mlp_size
        )
        if channels % num_heads or channels // num_heads > 128:
            raise ValueError(
                f"channels must be num_heads={num_heads} times a head size of at most 128,"
                f" got {channels}"
            )
        super().__init__()
        self.impl = impl
        self.probe = nn.Parameter(torch.randn(1, 1, channels))
        self.attention = nn.MultiheadAttention(channels, num_heads)  # for its parameters
        self.layernorm = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(channels, mlp_size), "fc2": nn.Linear(mlp_size, channels)}
        )

    def forward(self, x: Tensor, grid: PackedGrid) -> Tensor:
        """Pool the tokens ``x`` ``[T, C]`` of images to ``[G, C]``."""
        _check.grid_of("x", x, grid)
        weight, bias = self.attention.in_proj_weight, self.attention.in_proj_bias
        channels = x.shape[1]
        heads = (self.attention.num_heads, -1)
        query = F.linear(self.probe[0], weight[:channels], bias[:channels]).unflatten(1, heads)
        keys_values = F.linear(x, weight[channels:], bias[channels:]).unflatten(1, (2, *heads))
        k, v = keys_values.unbind(1)  # [T, H, D] each, views
        queries = torch.arange(grid.num_segments + 1, dtype=torch.int32, device=x.device)
        pooled = varlen_attention(
            query.expand(grid.num_segments, -1, -1),  # [G, H, D]
            k,
            v,
            queries,
            grid.cu_seqlens,
            impl=self.impl,
        )
        pooled = self.attention.out_proj(pooled.flatten(1))
        hidden = F.gelu(self.mlp["fc1"](self.layernorm(pooled)), approximate="tanh")
        return pooled + self.mlp["fc2"](hidden)
