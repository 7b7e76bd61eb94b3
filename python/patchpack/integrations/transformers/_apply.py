"""``apply_to``: put the ops of ``patchpack`` into a model of transformers, and take them out."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import transformers
from torch import nn

from patchpack.integrations.transformers import _attention, _text, _tiles, _vision
from patchpack.integrations.transformers._merge import both_kinds, features, placeholders
from patchpack.integrations.transformers._report import Context, Edit, Left, Report, is_applied

OPS = (
    "varlen_attention",
    "rope_2d",
    "mrope",
    "add_pos_embed",
    "merge_tokens",
    "interpolate_tokens",
    "assemble",
    "scatter_tokens",
    "metadata",
    "get_mrope_position_ids",
)
_RULES = (
    _vision.packed_encoder,
    _tiles.dense_encoder,
    _tiles.position_table,
    _tiles.pixel_unshuffle,
    _tiles.any_resolution,
    _text.language_model,
    _text.rope_index,
    features,
    both_kinds,
    placeholders,
)
_QWEN = {"varlen_attention", "rope_2d", "mrope", "metadata", "get_mrope_position_ids"}
# what must be found, or left for a stated reason, in models whose code is known
_KNOWN = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN | {"add_pos_embed", "scatter_tokens"},
    "internvl": {"varlen_attention", "mrope", "merge_tokens", "add_pos_embed"},
    "llava_onevision": {"varlen_attention", "mrope", "assemble", "interpolate_tokens"},
}


def apply_to(
    model: nn.Module, *, ops: Iterable[str] | None = None, impl: str | None = None
) -> Report:
    """Replace what a model of transformers does with ragged images by the ops of ``patchpack``.

    Only this model is touched: attributes of its instances are set, its configurations become
    copies of its own, and parameters, modules and classes stay. Values are the model's up to
    rounding. What can be replaced is found by looking at the model's code and, for rotary
    embeddings and positions, by trying; a version of transformers that does something else is
    refused before anything is touched.

    ========================== ====================================================================
    op                         where
    ========================== ====================================================================
    ``varlen_attention``       attention of vision encoder and language model, through the
                               ``AttentionInterface``: packed sequences in one call, padded batches
                               without masks
    ``rope_2d``                rotary embedding of the vision encoder
    ``mrope``                  that of the language model, from positions
    ``add_pos_embed``          the position table of the vision encoder, resized
    ``merge_tokens``           pixel-unshuffle of InternVL
    ``interpolate_tokens``     pooling of video frames in LLaVA-OneVision
    ``assemble``               AnyRes of LLaVA-OneVision: crops, padding, newlines
    ``scatter_tokens``         vision tokens added to hidden states (deepstack of Qwen3-VL), and
                               counts of placeholders that are not read back from a device
    ``metadata``               segments, positions and windows of vision encoders
    ``get_mrope_position_ids`` ``get_rope_index`` of models that have it
    ========================== ====================================================================

    Args:
        model: A model of transformers, or a part of it such as its vision encoder: Qwen2-VL,
            Qwen2.5-VL, Qwen3-VL, InternVL, LLaVA-OneVision, and in others whatever is alike.
        ops: Names of ``OPS`` to use; by default all that fit. One that is named and fits nowhere
            is an error.
        impl: As every op takes it; by default that of the device.

    Returns:
        What was replaced, what was left and why, which ``print`` shows; ``undo()`` reverts it.

    Raises:
        TypeError: ``model`` is no module, or ``ops`` are no names.
        ValueError: An op or ``impl`` is unknown, an op fits nowhere, nothing fits, or the model is
            applied to.
        RuntimeError: A known model does not look as it does in any version that is known.

    An applied model can be trained, compiled, copied by ``copy.deepcopy`` and sharded; ``undo``
    only ever reverts the model that ``apply_to`` was given. ``collate`` prepares batches for it.
    """
    if impl not in _attention.IMPLS:
        raise ValueError(f"impl must be of {_attention.IMPLS}, got {impl!r}")
    context = Context(_checked(model, ops), impl)
    found: list[Edit | Left] = []
    for path, module in model.named_modules():
        for rule in _RULES:
            found += rule(path, module, context)
    edits = [x for x in found if isinstance(x, Edit) and x.op in context.ops]
    left = tuple(x for x in found if isinstance(x, Left) and x.op in context.ops)
    _check_found(model, ops, context, edits, left)
    return Report(model, (*_own_configs(model, edits), *edits), left)._do()


def _checked(model: Any, ops: Iterable[str] | None) -> frozenset[str]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module of transformers, got {type(model).__name__}")
    if ops is None:
        names = OPS
    elif isinstance(ops, str) or not isinstance(ops, Iterable):
        raise TypeError(f"ops must be names of ops in a list, got {ops!r}")
    else:
        names = tuple(ops)
    for name in names:
        if name not in OPS:
            raise ValueError(f"ops must be of {', '.join(OPS)}, got {name!r}")
    for path, module in model.named_modules():
        if is_applied(module):
            raise ValueError(
                f"model must not be applied to already, got {path or 'one that is'}: undo() first"
            )
    return frozenset(names)


def _check_found(
    model: Any,
    ops: Iterable[str] | None,
    context: Context,
    edits: list[Edit],
    left: tuple[Left, ...],
) -> None:
    """Before anything is touched: all that must be there is, or is left for a reason."""
    fits = {edit.op for edit in edits}
    why = {x.op: x.why for x in left}
    version = transformers.__version__
    kind = getattr(getattr(model, "config", None), "model_type", "")
    known = _KNOWN.get(kind, set()) & context.ops
    strange = [x for x in left if x.strange and x.op in known]
    missing = sorted(known - fits - why.keys() | {x.op for x in strange})
    if missing:
        reasons = "".join(f"; {x.path}: {x.why}" for x in strange)
        raise RuntimeError(
            f"{type(model).__name__} of transformers {version} has no place for"
            f" {', '.join(missing)}: its code is not as in 5.9 to 5.24{reasons}"
        )
    for op in [] if ops is None else sorted(context.ops - fits):
        reason = why.get(op, "nothing in it does that")
        raise ValueError(f"ops must fit {type(model).__name__}, got {op!r}: {reason}")
    if not fits:
        reasons = "".join(f"; {x.path}: {x.why}" for x in left)
        raise ValueError(
            f"model must have a part that is known, got {type(model).__name__} of transformers"
            f" {version}{reasons}"
        )


def _own_configs(model: Any, edits: list[Edit]) -> list[Edit]:
    """Give the model copies of its configurations, which others may share, and edit the copies."""
    memo: dict[int, Any] = {}
    own = []
    for path, module in model.named_modules():
        config = vars(module).get("config")
        if config is not None:
            own.append(Edit("", path, module, "config", copy.deepcopy(config, memo), ""))
    for i, edit in enumerate(edits):
        if edit.name == "_attn_implementation":
            edits[i] = edit._replace(owner=memo[id(edit.owner)])
    return own
