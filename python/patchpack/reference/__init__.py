"""The specification: slow eager code, differentiable by autograd, in any floating dtype."""

from patchpack.reference.add_pos_embed import add_pos_embed as add_pos_embed
from patchpack.reference.interpolate_tokens import interpolate_tokens as interpolate_tokens
from patchpack.reference.mrope import mrope as mrope
from patchpack.reference.rope import rope as rope
from patchpack.reference.rope_2d import rope_2d as rope_2d
from patchpack.reference.varlen_attention import varlen_attention as varlen_attention
