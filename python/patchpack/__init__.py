"""Fused kernels for the ragged middle of native-resolution vision-language models."""

from patchpack import metadata, reference
from patchpack._dispatch import available
from patchpack.ops.add_pos_embed import add_pos_embed
from patchpack.ops.interpolate_tokens import interpolate_tokens
from patchpack.ops.mrope import mrope
from patchpack.ops.rope import rope
from patchpack.ops.rope_2d import rope_2d
from patchpack.ops.varlen_attention import varlen_attention
from patchpack.packing import PackedGrid

__version__ = "0.1.0"

__all__ = [
    "PackedGrid",
    "add_pos_embed",
    "available",
    "interpolate_tokens",
    "metadata",
    "mrope",
    "reference",
    "rope",
    "rope_2d",
    "varlen_attention",
]
