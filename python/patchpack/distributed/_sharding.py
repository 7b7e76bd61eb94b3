"""How every op may be sharded under ``torch.distributed.tensor``.

A rule is a signature, as of ``einsum``, and the axes that may be sharded. Every tensor argument and
every result of an operator is a term, whose letters name its dimensions; sharding an axis shards
each term that has its letter and replicates the others. A dot is a dimension, or a tensor of any,
that is never sharded; a term that ends with ``+`` is a sum over an axis that it does not have.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, experimental
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

from patchpack import PackedGrid, TokenLayout

T = TypeVar("T", Tensor, PackedGrid, TokenLayout)

# t, s tokens; h, k heads of queries and of keys; c channels
RULES: dict[str, tuple[str, tuple[str, ...]]] = {
    "rope": ("thd tkd tr tr -> thd tkd", ("t", "h", "k", "hk")),
    "rope_2d": ("thd tkd . -> thd tkd", ("h", "k", "hk")),
    "rope_2d_": ("thd tkd . ->", ("hk",)),
    "mrope": ("thd tkd at -> thd tkd", ("t", "h", "k", "hk")),
    "mrope_": ("thd tkd at ->", ("t", "hk")),
    "varlen_attention": ("thd skd skd . . -> thd ht", ("hk",)),
    "varlen_attention, one key head": ("thd s.d s.d . . -> thd ht", ("h",)),
    "varlen_attention_backward": ("thd ht thd skd skd thd ht . . -> thd skd skd", ("hk",)),
    "varlen_attention_backward, one key head": (
        "thd ht thd s.d s.d thd ht . . -> thd s.d+ s.d+",
        ("h",),
    ),
    "_varlen_attention_rotated": ("thd skd skd . . -> thd ht", ("hk",)),
    "_varlen_attention_rotated, one key head": ("thd s.d s.d . . -> thd ht", ("h",)),
    "add_pos_embed": ("tc ..c . -> tc .", ("c",)),
    "add_pos_embed_backward": ("tc . . -> ..c", ("c",)),
    "interpolate_tokens": ("tc . . -> tc .", ("c",)),
    "interpolate_tokens, max": ("tc . . -> tc tc", ("c",)),
    "interpolate_tokens_backward": ("tc . . . -> tc", ("c",)),
    "interpolate_tokens_backward, max": ("tc tc . . -> tc", ("c",)),
    "assemble": ("..c .c . . -> tc .", ("c",)),
    "assemble_backward": ("tc . . . -> ..c .c", ("c",)),
    "scatter_tokens": ("..c tc . .c . -> ..c .", ("c",)),
    "scatter_tokens_backward": ("..c . . -> ..c tc .c", ("c",)),
    "merge_tokens": (". . . . -> . . .", ()),
    "merge_tokens_backward": (". . . . . . . -> . . .", ()),
    "region_attention": (". . . -> . .", ()),
    "region_attention_backward": (". . . . . -> . .", ()),
    "patchify": (". . -> .", ()),
    "patchify_backward": (". . -> .", ()),
    "resize_patchify": (". . -> .", ()),
    "resize_images": (". -> .", ()),
}


@functools.cache
def register_sharding() -> None:
    """Tell ``torch.distributed.tensor`` how the ops may be sharded; a second call does nothing.

    Importing ``patchpack.distributed`` calls it. From then on every op takes ``DTensor`` arguments,
    and what it gives, values and gradients, is that of one device, to the bit where each device
    computes other heads, tokens or channels. All tensors of a call are then ``DTensor``, those of
    a ``PackedGrid`` or ``TokenLayout`` included: see ``replicate``.

    Besides replicated, arguments may be sharded so, in operators of the forward and the backward
    pass and in place; whatever else comes is redistributed by ``DTensor`` first, or refused in
    place:

    - heads: ``rope``, ``rope_2d``, ``mrope``, ``rope_2d_`` and ``mrope_``, and
      ``varlen_attention``, whose ``lse`` has them on dimension 0;
    - tokens: ``rope`` with its tables, ``mrope`` and ``mrope_`` with their ``position_ids``;
    - channels: ``add_pos_embed`` with its table, ``interpolate_tokens``, ``assemble`` and
      ``scatter_tokens`` with their vectors.

    Heads and channels must divide by the number of devices of the mesh. Queries and keys of a
    rotary op are independent: either alone may be sharded, but in place both, for which torch 2.10
    has no sharding and raises. Attention needs both, so that a query finds its key, but if there is
    one key head: then queries alone are sharded, and the gradients of keys and values are
    ``Partial``, sums over devices in another order than on one device.

    Tokens are not sharded where ``grid`` or ``cu_seqlens`` say, in coordinates of the whole
    sequence, which rows belong together: a device that holds a part of them would read those of
    others. ``sequence_parallel_attention`` moves the tokens instead. Channels are not sharded where
    one result takes all of them: the scores of ``region_attention``, the LayerNorm of
    ``merge_tokens``, whose merged channels would not be in one piece either. What is made of
    images, ``patchify`` and ``resize_images``, is replicated: images are shared out among devices
    as a whole, which ``encode_images`` does.

    References (``impl="reference"``, and float64) have no rules: they are eager code, with which
    ``DTensor`` does what it can. Both results of a rotary op have to be used where there is a
    gradient: PyTorch would give the other one a gradient of zeros that is no ``DTensor``, and
    refuse it.
    """
    for name in {rule.partition(",")[0] for rule in RULES}:
        for overload in getattr(torch.ops.patchpack, name).overloads():
            op = getattr(getattr(torch.ops.patchpack, name), overload)
            experimental.register_sharding(op)(functools.partial(_acceptable, op))
            _remember_sizes(op)


def _remember_sizes(op: Any) -> None:
    """Lists of sizes decide on the shape of a result too, and of what is cached for it."""
    for i, argument in enumerate(op._schema.arguments):
        if str(argument.type) in ("int", "List[int]"):
            known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
            known[op] = RuntimeSchemaInfo(i, needs_pytree=True)
            return


def _acceptable(op: Any, *args: Any) -> list[tuple[list[Placement], list[Placement]]]:
    """Placements of results and of tensor arguments, for one dimension of a mesh."""
    arguments = op._schema.arguments
    name = op._schema.name.removeprefix("patchpack::")
    named = {argument.name: arg for argument, arg in zip(arguments, args, strict=True)}
    if named.get("mode") == "max":
        name += ", max"
    if "attention" in name and "k" in named and named["k"].shape[1] == 1:
        name += ", one key head"
    signature, axes = RULES[name]
    before, after = (terms.split() for terms in signature.split("->"))

    given = [arg for argument, arg in zip(arguments, args, strict=True) if _is_tensors(argument)]
    inputs = []  # a term and what is known of a tensor
    for term, arg in zip(before, given, strict=True):
        tensors = arg if isinstance(arg, (list, tuple)) else [arg]
        inputs += [(term, x) for x in tensors if x is not None]
    if name.endswith("_") and inputs[0][1].placements != inputs[1][1].placements:
        raise ValueError(
            f"k must be placed as q, which are written in place, got {inputs[1][1].placements}"
            f" and {inputs[0][1].placements}"
        )
    return [
        ([_placement(term, axis) for term in after], [_placement(term, axis) for term, _ in inputs])
        for axis in ("", *axes)
        if all(_is_even(term, axis, x) for term, x in inputs)
    ]


def _is_tensors(argument: Any) -> bool:
    """Whether an argument of a schema is a tensor, one or none, or a list of them."""
    return "Tensor" in str(argument.type)


def _placement(term: str, axis: str) -> Placement:
    for dim, letter in enumerate(term):
        if letter in axis:
            return Shard(dim)
    return Partial() if axis and term.endswith("+") else Replicate()


def _is_even(term: str, axis: str, x: Any) -> bool:
    """Whether a tensor has as many heads or channels for every device; tokens need not be even."""
    return all(
        letter == "t" or letter not in axis or x.shape[dim] % x.mesh.size() == 0
        for dim, letter in enumerate(term)
    )


def replicate(value: T, mesh: DeviceMesh) -> T:
    """Make of what every device of a mesh holds what ops take beside ``DTensor`` arguments.

    Nothing is communicated.

    Args:
        value: A tensor, a ``PackedGrid`` or a ``TokenLayout``, the same on every device of
            ``mesh``. Of a grid that ``interpolate_tokens`` makes, replicate it before:
            ``target_hw=replicate(grid.resized(sizes), mesh)``.
        mesh: The devices.

    Returns:
        A ``DTensor`` of placement ``Replicate()``, or the grid or layout with such tensors.
        Differentiable where ``value`` is a tensor, as ``DTensor.from_local`` is.

    Raises:
        TypeError: ``value`` is none of these, or ``mesh`` no ``DeviceMesh``.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
    if isinstance(value, Tensor):
        everywhere = [Replicate()] * mesh.ndim
        return DTensor.from_local(value, mesh, everywhere, run_check=False)
    if isinstance(value, PackedGrid):
        tensors = {"geometry": value.geometry, "cu_seqlens": value.cu_seqlens}
        tensors["_position_ids"] = value.position_ids
    elif isinstance(value, TokenLayout):
        tensors = {"table": value.table, "maps": value.maps}
    else:
        raise TypeError(
            f"value must be a tensor, a PackedGrid or a TokenLayout, got {type(value).__name__}"
        )
    found = copy.copy(value)
    for name, x in tensors.items():
        object.__setattr__(found, name, replicate(x, mesh))  # both are frozen
    return found
