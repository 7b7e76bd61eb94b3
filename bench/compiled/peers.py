"""Kernels of other libraries, launched as they launch them, on the tensors that ours get.

    for peer in peers("sm_90", Path("checkouts")):
        if isinstance(peer, Peer):
            with compiled.session("sm_90") as launches:
                backward = peer.run()

Their code stays where whoever measures has it: in a folder with checkouts named as on GitHub
(``Liger-Kernel``, ``flash-attention``, ``vllm``, ``triton``), or one into which pip installed them.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from _harness import Bench
from _rotary import table
from compiled import inductor
from patchpack.testing.catalogue import SPECS, Inputs
from patchpack.testing.contract import leaves, tensors

GRIDS = [(1, 16, 24), (1, 20, 16), (1, 8, 40)]
LENGTHS = [t * h * w for t, h, w in GRIDS]

_VISION = {"sizes": GRIDS, "merge": 2, "num_heads": 16}
_TABLE = {"num_tokens": sum(LENGTHS), "num_heads": (16, 16)}
_LANGUAGE = {"num_tokens": 256, "num_heads": (28, 4), "head_dim": 128}
_PIXELS = {"sizes": GRIDS, "channels": 1280}

# by op and name, what its bench file makes the inputs of
CASES: dict[tuple[str, str], Inputs] = {
    ("rope", "vision"): {**_TABLE, "head_dim": 80},
    ("rope", "vision-128"): {**_TABLE, "head_dim": 128},
    ("rope", "language"): _LANGUAGE,
    ("rope_2d", "vision"): {**_VISION, "head_dim": 80},
    ("rope_2d", "vision-128"): {**_VISION, "head_dim": 128},
    ("mrope", "language"): {**_LANGUAGE, "mrope_section": (16, 24, 24)},
    ("add_pos_embed", "vision"): {
        **_PIXELS,
        "merge": 2,
        "side": (48, 48),
        "align_corners": True,
    },
    ("merge_tokens", "vision"): {**_PIXELS, "normalised": 4},
    ("region_attention", "vision"): {**_PIXELS, "region": 2},
    ("interpolate_tokens", "halved"): {"sizes": GRIDS, "channels": 1152},
    ("patchify", "photos"): {
        "sizes": [grid[1:] for grid in GRIDS],
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge": 2,
    },
    ("resize_images", "photo"): {"photos": [(240, 320)], "sizes": [(168, 224)]},
    ("scatter_tokens", "language"): {
        "num_rows": 256,
        "num_images": 2,
        "image_tokens": 64,
        "channels": 3584,
    },
    ("assemble", "whole tiles"): {
        "images": [((1, 2), (0, 0, 12, 24), (12, 24)), ((2, 2), (0, 0, 24, 24), (18, 18))],
        "side": 12,
        "channels": 896,
    },
}
for _head_dim in (64, 72, 80, 96, 128):
    CASES["varlen_attention", f"attention-{_head_dim}"] = {
        "lengths": LENGTHS,
        "num_heads": (16, 16),
        "head_dim": _head_dim,
    }

# by op, what gradients depend on besides the cotangents
NEEDS = {
    "rope": ("cos", "sin"),
    "rope_2d": ("grid",),
    "mrope": ("position_ids",),
    "add_pos_embed": ("grid",),
    "merge_tokens": ("x", "weight", "grid"),
    "region_attention": ("query", "tokens", "grid"),
    "varlen_attention": ("q", "k", "v", "cu_seqlens_q"),
    "interpolate_tokens": ("grid", "target_hw"),
    "patchify": (),
    "resize_images": (),
    "scatter_tokens": ("index",),
    "assemble": ("layout",),
}

Run = Callable[[], "Callable[[], Any] | None"]


@dataclass(frozen=True)
class Peer:
    """A way to compute an op.

    ``run`` is its forward pass, and returns its backward pass if there is one. In a second session
    it launches the configurations that autotuning chose in the first.
    """

    name: str
    op: str
    case: str  # with ``op`` a key of ``CASES``
    version: str  # or commit
    run: Run


@dataclass(frozen=True)
class Missing:
    """A peer that cannot be had, and why."""

    name: str
    op: str
    case: str
    reason: str


@dataclass(frozen=True)
class _Task:
    """What a peer has to do, for which GPU, and where its code is if it is not PyTorch's."""

    op: str
    inputs: Inputs
    target: str
    path: Path


@dataclass(frozen=True)
class _Source:
    """A file of a library: below ``checkout`` where git put it, as ``file`` where pip did."""

    checkout: str
    file: str

    def find(self, checkouts: Path) -> Path:
        places = [checkouts / self.checkout / self.file, checkouts / self.file]
        for path in places:
            if path.is_file():
                return path
        raise FileNotFoundError(f"expected {' or '.join(map(str, places))}")

    def version(self, path: Path) -> str:
        """The version that pip installed, or else the commit that is checked out."""
        package, *below = Path(self.file).parts
        folder = str(path.parents[len(below)])
        for installed in metadata.distributions(name=package, path=[folder]):
            return installed.version
        command = ["git", "-C", folder, "rev-parse", "--short=12", "HEAD"]
        git = subprocess.run(command, capture_output=True, text=True)
        if git.returncode:
            raise ValueError(f"{folder} has no version: neither pip nor git put it there")
        return git.stdout.strip()


@dataclass(frozen=True)
class _Library:
    """A library's way to compute an op, prepared by ``make``."""

    name: str
    op: str
    make: Callable[[_Task], Run]
    source: _Source | None = None  # otherwise Inductor writes the code
    packages: tuple[str, ...] = ()  # that have to be installed
    cases: tuple[str, ...] = ()  # all of the op's by default


def peers(target: str, checkouts: Path | None) -> Iterator[Peer | Missing]:
    """Others' ways to compute the cases, or why they cannot be had.

    Args:
        target: The GPU to be compiled for, a key of ``compiled.MULTIPROCESSORS``.
        checkouts: The folder with other libraries.
    """
    for library in _LIBRARIES:
        for op, case in CASES:
            if op == library.op and case in (library.cases or [case]):
                yield _find(library, case, target, checkouts)


def ours(op: str, case: str) -> Peer:
    """Our own kernels, in the form of a peer."""

    def make() -> Run:
        inputs = inputs_of(op, case)
        return _differentiated(functools.partial(SPECS[op].op, **inputs, impl="triton"), op, inputs)

    return Peer("patchpack", op, case, metadata.version("patchpack"), _lazy(make))


def _find(library: _Library, case: str, target: str, checkouts: Path | None) -> Peer | Missing:
    named = library.name, library.op, case
    path = Path()
    try:
        if library.source is None:
            inductor.check(target)
            packages = ("torch", *library.packages)
            version = ", ".join(f"{x} {metadata.version(x)}" for x in packages)
        elif checkouts is None:
            return Missing(*named, "no folder with other libraries was named")
        else:
            path = library.source.find(checkouts)
            version = library.source.version(path)
    except (OSError, ValueError, ImportError) as error:
        return Missing(*named, str(error))

    def make() -> Run:
        return library.make(_Task(library.op, inputs_of(library.op, case), target, path))

    return Peer(*named, version, _lazy(make))


def _lazy(make: Callable[[], Run]) -> Run:
    """What ``make`` gives, made when it first runs."""
    made = functools.cache(make)
    return lambda: made()()


def _bench(op: str) -> Bench:
    return importlib.import_module(f"bench_{op}").BENCH


def inputs_of(op: str, case: str) -> Inputs:
    """The arguments of an op in a case."""
    torch.manual_seed(0)
    return _bench(op).make_inputs(torch.bfloat16, "cpu", **CASES[op, case])


def read_of(op: str, inputs: Inputs) -> Any:
    """What the forward pass has to read: rows that others take the place of it has not."""
    if op != "scatter_tokens":
        return inputs
    embeds, index = inputs["embeds"], inputs["index"]
    kept = torch.ones(embeds.shape[1], dtype=torch.bool).index_fill(0, index, False)
    return embeds[:, kept], inputs["tokens"], index


def _differentiated(function: Callable[..., Any], op: str, inputs: Inputs) -> Run:
    """Forward through a function of what ``op`` has gradients of, and back, if there is any."""

    def forward() -> Callable[[], Any] | None:
        given = leaves(inputs, SPECS[op].grads)
        outputs = tensors(function(**given))
        wanted = [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]
        if not wanted:
            return None
        cotangents = [torch.randn_like(x) for x in outputs]
        return lambda: torch.autograd.grad(outputs, wanted, cotangents)

    return forward


# ----------------------------------------------------------------------- files of other libraries


def _load(path: Path) -> ModuleType:
    """A file as a module of its own, without the package around it."""
    spec = importlib.util.spec_from_file_location(path.stem.replace("-", "_"), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load_functions(path: Path, names: Sequence[str], **given: Any) -> list[Callable[..., Any]]:
    """Functions of a file whose imports cannot be had: they see ``given``, and one another."""
    tree = ast.parse(path.read_text())
    tree.body = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name in names]
    scope = {"__name__": path.stem, **given}
    exec(compile(tree, str(path), "exec"), scope)
    return [scope[name] for name in names]


# ---------------------------------------------------------------------------------- rotary kernels


def _heads_first(inputs: Inputs) -> Inputs:
    """``q`` and ``k`` as ``[1, H, T, D]``, in memory as Liger wants them: it would copy others."""
    return {name: inputs[name].contiguous()[None].transpose(1, 2) for name in ("q", "k")}


def _mrope_tables(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Cosines and sines of time, row and column, ``[3, T, D / 2]``."""
    half = inputs["q"].shape[2] // 2
    frequency = inputs.get("base", 1e6) ** -(torch.arange(half) / half)
    angle = inputs["position_ids"][:, :, None] * frequency
    return angle.cos(), angle.sin()


def _liger_rope(task: _Task, dtype: torch.dtype) -> Run:
    rotate = _load(task.path).LigerRopeFunction.apply
    cos, sin = (x.repeat(1, 2)[None].to(dtype) for x in table(task.op, task.inputs))
    return _differentiated(lambda q, k: rotate(q, k, cos, sin), task.op, _heads_first(task.inputs))


def _liger_mrope(task: _Task, dtype: torch.dtype) -> Run:
    rotate = _load(task.path).LigerQwen2VLMRopeFunction.apply
    cos, sin = (x.repeat(1, 1, 2)[:, None].to(dtype) for x in _mrope_tables(task.inputs))
    section = task.inputs["mrope_section"]
    return _differentiated(
        lambda q, k: rotate(q, k, cos, sin, section), task.op, _heads_first(task.inputs)
    )


def _vllm_mrope(task: _Task) -> Run:
    platform = SimpleNamespace(is_rocm=lambda: task.target.startswith("gfx"))
    names = ["_triton_mrope_forward", "triton_mrope"]
    _, rotate = _load_functions(
        task.path, names, torch=torch, triton=triton, tl=tl, current_platform=platform
    )
    q, k = (task.inputs[name].flatten(1).contiguous() for name in ("q", "k"))
    # in the dtype of the heads, which is how vLLM keeps them
    cos, sin = (x.to(q.dtype) for x in _mrope_tables(task.inputs))
    head_dim = task.inputs["q"].shape[2]
    options = {"mrope_interleaved": False, "is_neox_style": True}

    def forward() -> None:
        rotate(q, k, cos, sin, task.inputs["mrope_section"], head_dim, head_dim, **options)

    return forward


def _flash_attn_rope(task: _Task) -> Run:
    rotate = _load(task.path).apply_rotary
    cos, sin = table(task.op, task.inputs)

    def turn(q: Tensor, k: Tensor, *, conjugate: bool) -> list[Tensor]:
        with (  # both do nothing of use on CPU tensors
            mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext()),
            mock.patch.object(torch.library, "wrap_triton", side_effect=lambda kernel: kernel),
        ):
            return [rotate(x[None], cos, sin, conjugate=conjugate)[0] for x in (q, k)]

    def forward() -> Callable[[], Any]:
        outputs = turn(task.inputs["q"], task.inputs["k"], conjugate=False)
        gradients = [torch.randn_like(x) for x in outputs]
        return lambda: turn(*gradients, conjugate=True)

    return forward


# --------------------------------------------------------------------------------------- attention


def _tutorial_attention(task: _Task) -> Run:
    """One sequence of all the tokens, in float16: it takes no others."""
    inputs = {name: task.inputs[name].half().transpose(0, 1)[None].contiguous() for name in "qkv"}
    scale = inputs["q"].shape[3] ** -0.5
    capability = functools.partial(
        mock.patch.object,
        torch.cuda,
        "get_device_capability",
        lambda: inductor.capability(task.target),
    )
    with capability():
        module = _load(task.path)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with capability():
            return module.attention(q, k, v, False, scale, False)

    return _differentiated(attend, task.op, inputs)


# FlexAttention has no gradients of tensors on a CPU: it refuses, and does not save what they need
_kernel_options = flex._apply_kernel_options


def _any_device(*tensors: Tensor) -> None:
    pass


def _training_options(*args: Any, **kwargs: Any) -> Any:
    return {**_kernel_options(*args, **kwargs), "OUTPUT_LOGSUMEXP": True}


def _flex_attention(task: _Task) -> Run:
    """Its block mask is made before, once a batch."""
    lengths = task.inputs["cu_seqlens_q"].diff()
    segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    def visible(_b, _h, i, j):
        return segment[i] == segment[j]

    mask = flex.create_block_mask(visible, None, None, len(segment), len(segment), device="cpu")
    attend = functools.partial(_compiled(flex.flex_attention, task), block_mask=mask)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        with (
            mock.patch.object(flex, "_validate_device", _any_device),
            mock.patch.object(flex, "_apply_kernel_options", _training_options),
        ):
            return attend(*heads_first)

    return _differentiated(function, task.op, task.inputs)


# ------------------------------------------------------------------------------ eager code, by name


def _compiled(function: Callable[..., Any], task: _Task) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend=inductor.backend(task.target), dynamic=False)


def _eager(task: _Task, name: str, given: tuple[str, ...] = ()) -> Run:
    """A provider of the op's bench file, compiled; ``given`` are the inputs it is called with."""
    function = _compiled(_bench(task.op).peers[name](task.inputs), task)
    function = functools.partial(function, **{name: task.inputs[name] for name in given})
    return _differentiated(function, task.op, task.inputs)


def _mrope(task: _Task) -> Run:
    """As in transformers' Qwen2-VL, where tables are in the dtype of the heads."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb  # pyright: ignore[reportMissingImports]

    dtype = task.inputs["q"].dtype
    cos, sin = (x.repeat(1, 2).to(dtype) for x in table(task.op, task.inputs))

    def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return apply_rotary_pos_emb(q, k, cos, sin)

    return _differentiated(_compiled(rotate, task), task.op, task.inputs)


def _pos_embed(task: _Task) -> Run:
    """As transformers' Qwen3-VL sums rows of its table, with indices and weights made before."""
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights  # pyright: ignore[reportMissingImports]

    grid, side = task.inputs["grid"], task.inputs["table"].shape[0]
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid.grid_thw, side, "bilinear", True, grid.spatial_merge_size
    )

    def add(x: Tensor, table: Tensor) -> Tensor:
        rows = F.embedding(indices, table.flatten(0, 1))
        return x + (rows * weights[:, :, None]).sum(1).to(x.dtype)

    return _differentiated(_compiled(add, task), task.op, task.inputs)


_LIGER_ROPE = _Source("Liger-Kernel/src", "liger_kernel/ops/rope.py")
_LIGER_MROPE = _Source("Liger-Kernel/src", "liger_kernel/ops/qwen2vl_mrope.py")
_FLASH_ATTN = _Source("flash-attention", "flash_attn/ops/triton/rotary.py")
_VLLM = _Source("vllm", "vllm/model_executor/layers/rotary_embedding/mrope.py")
_TUTORIAL = _Source("triton", "python/tutorials/06-fused-attention.py")

_LIBRARIES = (
    *(
        _Library(
            f"Liger, {dtype} tables",
            op,
            functools.partial(make, dtype=getattr(torch, dtype)),
            source,
        )
        for op, make, source in (
            ("rope", _liger_rope, _LIGER_ROPE),
            ("rope_2d", _liger_rope, _LIGER_ROPE),
            ("mrope", _liger_mrope, _LIGER_MROPE),
        )
        for dtype in ("bfloat16", "float32")
    ),
    *(
        _Library("flash-attn", op, _flash_attn_rope, _FLASH_ATTN)
        for op in ("rope", "rope_2d", "mrope")
    ),
    _Library("vLLM", "mrope", _vllm_mrope, _VLLM),
    *(
        _Library(
            "Inductor",
            op,
            functools.partial(_eager, name=name, given=given),
            packages=("transformers",) if name == "transformers" else (),
        )
        for op, name, given in (
            ("rope", "transformers", ()),
            ("rope_2d", "transformers", ()),
            ("merge_tokens", "views, F.layer_norm", ()),
            ("region_attention", "gather, bmm", ()),
            ("interpolate_tokens", "gather", ()),
            ("patchify", "torch, image by image", ("images", "dtype")),
            ("scatter_tokens", "index_copy", ("index",)),
            ("assemble", "the original's chain", ()),
        )
    ),
    _Library("Inductor", "mrope", _mrope, packages=("transformers",)),
    _Library("Inductor", "add_pos_embed", _pos_embed, packages=("transformers",)),
    _Library("FlexAttention", "varlen_attention", _flex_attention),
    _Library(
        "Triton tutorial",
        "varlen_attention",
        _tutorial_attention,
        _TUTORIAL,
        cases=("attention-64", "attention-128"),
    ),
)
