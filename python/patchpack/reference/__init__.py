"""The specification: slow eager code, differentiable by autograd, in any floating dtype."""

from patchpack.reference.add_pos_embed import add_pos_embed as add_pos_embed
from patchpack.reference.assemble import assemble as assemble
from patchpack.reference.interpolate_tokens import interpolate_tokens as interpolate_tokens
from patchpack.reference.merge_tokens import merge_tokens as merge_tokens
from patchpack.reference.mrope import mrope as mrope
from patchpack.reference.patchify import patchify as patchify
from patchpack.reference.region_attention import region_attention as region_attention
from patchpack.reference.resize_images import resize_images as resize_images
from patchpack.reference.rope import rope as rope
from patchpack.reference.rope_2d import rope_2d as rope_2d
from patchpack.reference.scatter_tokens import scatter_tokens as scatter_tokens
from patchpack.reference.varlen_attention import varlen_attention as varlen_attention
