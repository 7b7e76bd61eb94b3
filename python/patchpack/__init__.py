"""Fused kernels for the ragged middle of native-resolution vision-language models."""

from patchpack import metadata, reference
from patchpack._dispatch import available
from patchpack.layout import TokenLayout
from patchpack.ops.add_pos_embed import add_pos_embed
from patchpack.ops.assemble import assemble
from patchpack.ops.interpolate_tokens import interpolate_tokens
from patchpack.ops.merge_tokens import merge_tokens
from patchpack.ops.mrope import mrope, mrope_
from patchpack.ops.patchify import patchify
from patchpack.ops.region_attention import region_attention
from patchpack.ops.resize_images import resize_images
from patchpack.ops.rope import rope
from patchpack.ops.rope_2d import rope_2d, rope_2d_
from patchpack.ops.scatter_tokens import scatter_tokens
from patchpack.ops.varlen_attention import varlen_attention
from patchpack.packing import PackedGrid

__version__ = "0.1.0"

__all__ = [
    "PackedGrid",
    "TokenLayout",
    "add_pos_embed",
    "assemble",
    "available",
    "interpolate_tokens",
    "merge_tokens",
    "metadata",
    "mrope",
    "mrope_",
    "patchify",
    "reference",
    "region_attention",
    "resize_images",
    "rope",
    "rope_2d",
    "rope_2d_",
    "scatter_tokens",
    "varlen_attention",
]
