"""Many ranks compute what one does. As a script, this file runs ``CHECKS`` on some ranks.

``python tests/test_distributed.py RANKS FILE`` writes what went wrong in each, by rank and name.
"""

import datetime
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from marks import slow
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.torch_version import TorchVersion

import patchpack
from patchpack import PackedGrid, TokenLayout
from patchpack.distributed import (
    encode_images,
    even_lengths,
    gather_tokens,
    replicate,
    sequence_parallel_attention,
    shard_tokens,
)
from patchpack.distributed._sharding import RULES
from patchpack.models import NativeViT, NativeViTConfig
from patchpack.packing import balance
from patchpack.testing.catalogue import SPECS

ROOT = Path(__file__).parents[1]
RANKS = (2, 4)
CONFIG = NativeViTConfig(
    patch_size=2, in_channels=1, hidden_size=64, depth=2, num_heads=4, mlp_ratio=2, out_size=24
)

# --------------------------------------------------------------------------------- how checks run

CHECKS: dict[str, tuple[tuple[int, ...], Callable]] = {}


def check(name: str, ranks: tuple[int, ...] = RANKS):
    """A function of a process group, that all of these numbers of ranks run."""

    def register(function):
        CHECKS[name] = ranks, function
        return function

    return register


def _work(rank: int, ranks: int, folder: str) -> None:
    """Run the checks of so many ranks, and write a rank's errors."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    warnings.simplefilter("error")
    errors = {}
    for name, (wanted, function) in CHECKS.items():
        if ranks not in wanted:
            continue
        # of its own, so that a rank that stops in the middle leaves nothing for the next one
        group = dist.new_group(timeout=datetime.timedelta(seconds=30))
        torch.manual_seed(0)
        try:
            function(group)
        except Exception:
            errors[name] = traceback.format_exc()
        dist.barrier()
    Path(folder, f"{rank}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()


def main() -> None:
    ranks, out = int(sys.argv[1]), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_work, (ranks, folder), nprocs=ranks)
        errors = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    out.write_text(json.dumps(errors))


def _close(got: torch.Tensor, want: torch.Tensor, tolerance: float, what: str = "") -> None:
    """The largest error is within ``tolerance`` of the largest value."""
    got, want = (x.full_tensor() if isinstance(x, DTensor) else x for x in (got, want))
    assert got.shape == want.shape, f"{what}: {list(got.shape)}, want {list(want.shape)}"
    error = (got - want).abs().max() / want.abs().max() if want.numel() else 0.0
    assert error <= tolerance, f"{what}: error {error:.1e}"


# ---------------------------------------------------------------------------------------- DTensor

HEADS = {"heads": {"q": 1, "k": 1}, "queries alone": {"q": 1}, "keys alone": {"k": 1}}
# by op, what is sharded on which dimension where it may be; all can be replicated
SHARDED = {
    "rope": {**HEADS, "tokens": {"q": 0, "k": 0, "cos": 0, "sin": 0}},
    "rope_2d": HEADS,
    "mrope": {**HEADS, "tokens": {"q": 0, "k": 0, "position_ids": 1}},
    "varlen_attention": {"heads": {"q": 1, "k": 1, "v": 1}, "queries alone": {"q": 1}},
    "add_pos_embed": {"channels": {"x": 1, "table": 2}},
    "interpolate_tokens": {"channels": {"x": 1}},
    "assemble": {"channels": {"tokens": 1, "vectors": 1}},
    "scatter_tokens": {"channels": {"embeds": -1, "tokens": 1, "vectors": 1}},
    "merge_tokens": {},
    "region_attention": {},
    "patchify": {},
    "resize_images": {},
}
# what may not be sharded, and is redistributed
REDISTRIBUTED = {
    "rope_2d": {"q": 0, "k": 0},
    "varlen_attention": {"q": 0, "k": 0, "v": 0},
    "add_pos_embed": {"x": 0},
    "interpolate_tokens": {"x": 0},
    "scatter_tokens": {"tokens": 0},
    "merge_tokens": {"x": 1},
    "region_attention": {"query": 1, "tokens": 1},
}


def _on_mesh(x, mesh: DeviceMesh, dim: int | None = None):
    """An argument for ``DTensor``, sharded on a dimension or replicated."""
    if isinstance(x, list) and x and isinstance(x[0], torch.Tensor):
        return [_on_mesh(y, mesh) for y in x]
    if isinstance(x, torch.Tensor):
        placement = Replicate() if dim is None else Shard(dim % x.ndim)
        y = distribute_tensor(x.detach(), mesh, [placement], src_data_rank=None)
        return y.requires_grad_(x.requires_grad)
    return replicate(x, mesh) if isinstance(x, (PackedGrid, TokenLayout)) else x


def _inputs(op: str, options: dict) -> dict:
    """Arguments of a case; what has a gradient requires it."""
    spec = SPECS[op]
    inputs = spec.pack(spec.make_images(dtype=torch.float32, device="cpu", seed=0, **options))
    if op == "interpolate_tokens":
        order = inputs.pop("spatial_merge_size", None)
        inputs["target_hw"] = inputs["grid"].resized(inputs["target_hw"], order)
    for name in SPECS[op].grads:
        values = inputs[name] if isinstance(inputs[name], list) else [inputs[name]]
        for x in values:
            if x is not None and x.is_floating_point():
                x.requires_grad_()
    return inputs


def _leaves(inputs: dict, names) -> dict[str, torch.Tensor]:
    found = {}
    for name in names:
        values = inputs[name] if isinstance(inputs[name], list) else [inputs[name]]
        found |= {f"{name}[{i}]": x for i, x in enumerate(values) if x is not None}
    return {name: x for name, x in found.items() if x.requires_grad}


def _run(op: str, inputs: dict, seeds: list[torch.Tensor] | None, whole: bool = False):
    """Results, gradients, and the seeds of the backward pass: sharded as results, or ``whole``."""
    found = SPECS[op].op(**inputs, impl="native")
    found = found if isinstance(found, (tuple, list)) else [found]
    outs = [x for x in found if isinstance(x, torch.Tensor)]
    seeds = seeds or [torch.randn(x.shape) for x in outs]
    leaves = _leaves(inputs, SPECS[op].grads)
    if leaves:
        of = []
        for x, seed in zip(outs, seeds, strict=True):
            if isinstance(x, DTensor):
                placements = [Replicate()] if whole else x.placements
                seed = distribute_tensor(seed, x.device_mesh, placements, src_data_rank=None)
            of.append(seed)
        torch.autograd.backward(outs, of)
    return outs, {name: x.grad for name, x in leaves.items()}, seeds


def _is_legal(op: str, how: str, inputs: dict, sharded: dict[str, int], ranks: int) -> bool:
    """Whether heads and channels divide, so that nothing has to be redistributed."""
    if not sharded:
        return True
    if op == "varlen_attention" and (how == "queries alone") != (inputs["k"].shape[1] == 1):
        return False
    sizes = [inputs[name].shape[dim] for name, dim in sharded.items() if inputs[name] is not None]
    return min(sizes) >= ranks and (how == "tokens" or all(n % ranks == 0 for n in sizes))


def _check_op(op: str, group: dist.ProcessGroup) -> None:
    mesh = DeviceMesh.from_group(group, "cpu")
    legal = set()
    cases = dict(SPECS[op].cases)
    if group.size() > 2:
        sizes = [(1, 4, 6), (2, 3, 2)]
        cases = {
            "heads for all": {"sizes": sizes, "heads": (8, 4)},
            "one key head": {"sizes": sizes, "heads": (4, 1)},
        }
    for case, options in cases.items():
        plain = _inputs(op, options)
        want, want_grads, seeds = _run(op, plain, None)
        ways = {"replicated": {}, **SHARDED[op], "redistributed": REDISTRIBUTED.get(op, {})}
        if "channels" in ways:
            ways["whole gradients"] = ways["channels"]
        for how, sharded in ways.items():
            inputs = {
                name: _on_mesh(x, mesh, sharded.get(name))
                for name, x in _inputs(op, options).items()
            }
            what = f"{op}, {case}, {how}"
            with CommDebugMode() as sent:
                outs, grads, _ = _run(op, inputs, seeds, how == "whole gradients")
            for got, x in zip(outs, want, strict=True):
                assert torch.equal(got.full_tensor(), x), what
            assert grads.keys() == want_grads.keys()
            for name, grad in grads.items():
                if how != "replicated" and name in ("k[0]", "v[0]") and plain["k"].shape[1] == 1:
                    # of one key head, which may be a sum over ranks: in another order
                    _close(grad, want_grads[name], 1e-5, f"{what}, gradient of {name}")
                else:
                    assert torch.equal(grad.full_tensor(), want_grads[name]), f"{what}, {name}"
            if how == "redistributed":
                assert outs[0].placements != (Shard(0),), what
            elif how != "whole gradients" and _is_legal(op, how, plain, sharded, group.size()):
                legal.add(how)
                assert sent.get_total_counts() == 0, f"{what}: {sent.get_comm_counts()}"
                for name, dim in sharded.items():
                    if plain[name] is not None:
                        dim %= plain[name].ndim
                        got = inputs[name].grad if plain[name].requires_grad else inputs[name]
                        assert got.placements == (Shard(dim),), f"{what}, {name}"
                places = [x.placements[0] for x in outs]
                assert how == "replicated" or places[0].is_shard() or how == "keys alone", what
    assert legal == {"replicated", *SHARDED[op]}, f"{op}: cases for {legal} alone"


for _op in SPECS:
    # four ranks for what has heads
    _ranks = RANKS if "heads" in SHARDED.get(_op, ()) else (2,)
    check(f"{_op} under DTensor", _ranks)(lambda group, op=_op: _check_op(op, group))


@check("in place under DTensor")
def _(group):
    mesh = DeviceMesh.from_group(group, "cpu")
    grid = PackedGrid([(2, 4), (3, 2)])
    ids = torch.randint(9, (3, grid.num_tokens))
    mrope_ = functools.partial(patchpack.mrope_, mrope_section=[2, 3, 3])
    qkv, seed = torch.randn(2, grid.num_tokens, 3, 4, 16)
    if TorchVersion(torch.__version__) < (2, 11):
        with pytest.raises(RuntimeError):
            patchpack.rope_2d_(_on_mesh(qkv, mesh), replicate(grid, mesh))
        return
    for turn, where, dims in ((patchpack.rope_2d_, grid, (None, 2)), (mrope_, ids, (None, 2, 0))):
        leaf = qkv.clone().requires_grad_()
        want = turn(leaf * 1, where)
        want.backward(seed)
        for dim in dims:
            of = _on_mesh(where, mesh, 1 if dim == 0 else None)
            x = _on_mesh(qkv.clone(), mesh, dim)
            assert turn(x, of) is x
            assert torch.equal(x.full_tensor(), want), f"{turn}, {dim}"
            x = _on_mesh(qkv.clone().requires_grad_(), mesh, dim)
            turn(x * 1, of).backward(_on_mesh(seed, mesh, dim))
            assert torch.equal(x.grad.full_tensor(), leaf.grad), f"{turn}, {dim}"

    # what cannot be done where it lies is refused, and nothing is written
    fused = _on_mesh(qkv.flatten(1, 2), mesh, 1)
    with pytest.raises(ValueError, match="qkv must not be sharded on dimension 1"):
        patchpack.rope_2d_(fused, replicate(grid, mesh), num_heads=(4, 4))
    assert torch.equal(fused.full_tensor(), qkv.flatten(1, 2))
    x = _on_mesh(qkv.clone(), mesh, 0)
    with pytest.raises(RuntimeError):
        patchpack.rope_2d_(x, replicate(grid, mesh))
    assert torch.equal(x.full_tensor(), qkv)
    q, k = _on_mesh(qkv[:, 0].clone(), mesh, 1), _on_mesh(qkv[:, 1].clone(), mesh)
    with pytest.raises(RuntimeError, match="k must be placed as q"):
        torch.ops.patchpack.mrope_.native(q, k, _on_mesh(ids, mesh), [2, 3, 3], False, 1e6, False)
    assert torch.equal(q.full_tensor(), qkv[:, 0])


@check("sizes are not mistaken for those of the last call", (2,))
def _(group):
    mesh = DeviceMesh.from_group(group, "cpu")
    image = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    for size in ((4, 6), (8, 2), (6, 4)):
        (got,) = patchpack.resize_images([_on_mesh(image, mesh)], [size])
        assert torch.equal(got.full_tensor(), patchpack.resize_images([image], [size])[0])
    grid = PackedGrid([(4, 4)])
    x = _on_mesh(torch.randn(16, 4), mesh, 1)
    for size in ((2, 3), (1, 1), (5, 2)):
        target = grid.resized([size])
        got, _ = patchpack.interpolate_tokens(x, replicate(grid, mesh), replicate(target, mesh))
        want, _ = patchpack.interpolate_tokens(x.full_tensor(), grid, target)
        assert torch.equal(got.full_tensor(), want)


@check("Triton's kernels are sharded likewise", (2,))
def _(group):
    mesh = DeviceMesh.from_group(group, "cpu")
    grid = PackedGrid([(1, 2)])
    q, k = torch.randn(2, 2, 2, 16)
    want = patchpack.rope_2d(q, k, grid, impl="triton")
    q, k = (_on_mesh(x, mesh, 1) for x in (q, k))
    got = patchpack.rope_2d(q, k, replicate(grid, mesh), impl="triton")
    assert [x.placements for x in got] == [(Shard(1),)] * 2
    assert all(torch.equal(x.full_tensor(), y) for x, y in zip(got, want, strict=True))


@check("a mesh of two dimensions", (4,))
def _(group):
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2))
    q, k = torch.randn(7, 8, 16), torch.randn(7, 4, 16)
    cos, sin = torch.randn(2, 7, 8)
    want = patchpack.rope(q, k, cos, sin)
    both = [distribute_tensor(x, mesh, [Shard(0), Shard(1)], src_data_rank=None) for x in (q, k)]
    tables = [
        distribute_tensor(x, mesh, [Shard(0), Replicate()], src_data_rank=None) for x in (cos, sin)
    ]
    with CommDebugMode() as sent:
        got = patchpack.rope(*both, *tables)
    assert sent.get_total_counts() == 0
    assert got[0].placements == (Shard(0), Shard(1))
    assert all(torch.equal(x.full_tensor(), y) for x, y in zip(got, want, strict=True))
    # six key heads of four devices would meet the queries of others
    q, k = torch.randn(7, 12, 16), torch.randn(7, 6, 16)
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    want = patchpack.varlen_attention(q, k, k, cu_seqlens)
    q, k = (distribute_tensor(x, mesh, [Shard(1)] * 2, src_data_rank=None) for x in (q, k))
    got = patchpack.varlen_attention(q, k, k, replicate(cu_seqlens, mesh))
    assert torch.equal(got.full_tensor(), want)


# --------------------------------------------------------------------------------------- sequences


def _attention_case(heads, dtype=torch.float32, **options):
    grid = PackedGrid([(4, 6), (2, 2), (8, 4)], 2)
    (num_q_heads, num_k_heads), head_dim = heads, 16
    q = torch.randn(grid.num_tokens, num_q_heads, head_dim).to(dtype)
    k, v = torch.randn(2, grid.num_tokens, num_k_heads, head_dim).to(dtype).unbind()
    return grid, [q, k, v], torch.randn(q.shape).to(dtype), options


CUTS = {  # tokens of every rank, of 60
    2: [None, [7, 53], [0, 60]],
    4: [None, [1, 30, 0, 29]],
}


@check("sequence_parallel_attention")
def _(group):
    n = group.size()
    for heads, dtype, options in (
        ((8, 8), torch.float32, {"rope": True}),
        ((8, 4), torch.float32, {"causal": True, "window_size": (9, 0)}),
        ((8, 8), torch.bfloat16, {"rope": True, "rope_axes": "paired", "rope_interleaved": True}),
        ((8, 2), torch.float32, {"softmax_scale": 0.3}),
        ((4, 1), torch.float32, {"rope": True, "max_seqlen": 32}),
    ):
        grid, tensors, seed, _ = _attention_case(heads, dtype)
        options = {**options, **({"rope": grid} if "rope" in options else {})}
        alone = {("max_seqlen_q" if k == "max_seqlen" else k): v for k, v in options.items()}
        whole = [x.clone().requires_grad_() for x in tensors]
        want = patchpack.varlen_attention(*whole, grid.cu_seqlens, **alone)
        want.backward(seed)
        for lengths in CUTS[n]:
            lengths = lengths or even_lengths(grid.num_tokens, group=group)
            mine = [shard_tokens(x, lengths, group=group).clone() for x in tensors]
            for x in mine:
                x.requires_grad_()
            got = sequence_parallel_attention(
                *mine, grid.cu_seqlens, lengths, group=group, **options
            )
            got.backward(shard_tokens(seed, lengths, group=group))
            what = f"{heads} heads, {dtype}, {lengths}"
            assert torch.equal(got, shard_tokens(want, lengths, group=group)), what
            for name, x, y in zip("qkv", mine, whole, strict=True):
                grad = shard_tokens(y.grad, lengths, group=group)
                if name != "q" and heads[1] < n:  # each rank's share was rounded
                    _close(x.grad, grad, 1e-6, f"{what}, gradient of {name}")
                else:
                    assert torch.equal(x.grad, grad), f"{what}, gradient of {name}"


@check("shard_tokens and gather_tokens")
def _(group):
    n, rank = group.size(), group.rank()
    for lengths in CUTS[n]:
        lengths = lengths or even_lengths(60, group=group)
        assert sum(lengths) == 60
        x = torch.arange(120.0).view(60, 2).requires_grad_()
        mine = shard_tokens(x, lengths, group=group)
        whole = gather_tokens(mine, lengths, group=group)
        assert torch.equal(whole, x)
        (whole * (rank + 1)).sum().backward()
        begin = sum(lengths[:rank])
        want = torch.zeros(60, 2)
        want[begin : begin + lengths[rank]] = n * (n + 1) / 2  # of all ranks' losses
        assert torch.equal(x.grad, want)
    assert even_lengths(7, group=group) == {2: [4, 3], 4: [2, 2, 2, 1]}[n]


def _block(block, x, grid, lengths, group):
    """A block of ``NativeViT`` on this rank's tokens."""
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(x)).unflatten(1, (3, CONFIG.num_heads, -1)).unbind(1)
    out = sequence_parallel_attention(q, k, v, grid.cu_seqlens, lengths, group=group, rope=grid)
    x = x + attn.proj(out.flatten(1))
    return x + block.mlp(block.norm2(x))


@check("NativeViT with its tokens on many ranks")
def _(group):
    grid = PackedGrid([(4, 6), (2, 2), (8, 4)], 2)
    pixels = torch.randn(grid.num_tokens, CONFIG.patch_dim)
    model = _model()
    want = model(pixels, grid)
    seed = torch.randn(want.shape)
    want.backward(seed)
    for lengths in CUTS[group.size()]:
        lengths = lengths or even_lengths(grid.num_tokens, group=group)
        shared = _model()
        x = shared.patch_embed(shard_tokens(pixels, lengths, group=group))
        for block in shared.blocks:
            x = _block(block, x, grid, lengths, group)
        got = shared.merger(gather_tokens(x, lengths, group=group), grid, None)
        _close(got, want, 2e-6, "tokens")  # matrix products of fewer rows
        got.backward(seed / group.size())  # all ranks have this loss
        for (name, parameter), other in zip(
            shared.named_parameters(), model.parameters(), strict=True
        ):
            dist.all_reduce(parameter.grad, group=group)
            _close(parameter.grad, other.grad, 2e-5, name)


# ------------------------------------------------------------------------------------------ images


def _model(dtype=torch.float32, impl=None, **changes):
    torch.manual_seed(1)
    model = NativeViT(NativeViTConfig(**{**vars(CONFIG), **changes}), impl=impl)
    for parameter in model.parameters():  # biases and norms too, or their gradients hide faults
        torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


# two ranks take the second and third of these images, and the first and fourth
SIZES = [[(1, 4, 8), (1, 4, 10), (2, 2, 2)], [(1, 2, 6)], [], [(1, 4, 4), (3, 2, 2)]]


def _images(group, sizes=SIZES, dtype=torch.float32):
    """Sizes by rank, this rank's patches, and the patches and seeds of all."""
    sizes = sizes[: group.size()]
    torch.manual_seed(2)
    patches = [
        [torch.randn(t * h * w, CONFIG.patch_dim, dtype=dtype) for t, h, w in held]
        for held in sizes
    ]
    mine = [torch.empty(0, CONFIG.patch_dim, dtype=dtype), *patches[group.rank()]]
    return sizes, torch.cat(mine), torch.cat([x for held in patches for x in held])


def _of_rank(x: torch.Tensor, sizes, rank: int, merged: int) -> torch.Tensor:
    counts = [sum(t * h * w for t, h, w in held) // merged for held in sizes]
    return x.split(counts)[rank]


@check("encode_images")
def _(group):
    for dtype, impl, changes, tolerance in (
        (torch.float64, "reference", {}, 1e-13),
        (torch.float32, None, {}, 1e-5),
        (torch.float32, None, {"deepstack_blocks": (0,)}, 1e-5),
        (torch.float32, None, {"out_size": None}, 1e-5),
    ):
        sizes, pixels, everything = _images(group, dtype=dtype)
        merged = 4 if "out_size" not in changes else 1
        grid = PackedGrid([s for held in sizes for s in held], 2)
        everything.requires_grad_()
        alone = _model(dtype, impl, **changes)
        want = alone(everything, grid)
        want = [want[0], *want[1]] if isinstance(want, tuple) else [want]
        seeds = [torch.randn(x.shape, dtype=dtype) for x in want]
        torch.autograd.backward(want, seeds)

        rank = group.rank()
        own, shared = PackedGrid(sizes[rank], 2), _model(dtype, impl, **changes)
        for known in (None, sizes):
            pixels = pixels.detach().requires_grad_()
            shared.zero_grad()
            got = encode_images(
                shared, pixels, own, group=group, sizes=known, merge_size=int(merged**0.5)
            )
            got = [got[0], *got[1]] if isinstance(got, tuple) else [got]
            assert len(got) == len(want)
            what = f"{dtype}, {changes}"
            for x, y in zip(got, want, strict=True):
                _close(x, _of_rank(y, sizes, rank, merged), tolerance, f"{what}, tokens")
            torch.autograd.backward(got, [_of_rank(x, sizes, rank, merged) for x in seeds])
            _close(pixels.grad, _of_rank(everything.grad, sizes, rank, 1), tolerance, "pixels")
            for (name, x), y in zip(shared.named_parameters(), alone.parameters(), strict=True):
                dist.all_reduce(x.grad, group=group)
                _close(x.grad, y.grad, tolerance, f"{what}, {name}")


@check("encode_images shares them out by cost")
def _(group):
    sizes, pixels, _ = _images(group)
    rank = group.rank()
    seen = []

    def encoder(pixels, grid):
        seen.append((grid.grid_thw.tolist(), grid.spatial_merge_size, pixels.clone()))
        return pixels[::4, :1] * 1.0

    def cost(size):
        return size[1]  # its rows

    own = PackedGrid(sizes[rank], 2)
    got = encode_images(encoder, pixels, own, group=group, cost=cost)
    assert torch.equal(got, pixels[::4, :1])
    images = [size for held in sizes for size in held]
    share = balance(images, group.size(), cost).ranks[rank]
    assert seen[0][:2] == ([list(images[i]) for i in share], 2)
    # nobody has an image
    none = encode_images(encoder, pixels[:0], PackedGrid([], 2), group=group)
    assert none.shape == (0, 1)
    with pytest.raises(ValueError, match=r"merge_size must be such that encoder gives \d+ tokens"):
        encode_images(
            lambda x, grid: x[:-1] if len(x) else x[:1].new_empty(1, 1), pixels, own, group=group
        )


@check("a group of some of the ranks", (4,))
def _(_):
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    which, rank = dist.get_rank() % 2, dist.get_rank() // 2
    group = groups[which]
    assert even_lengths(5, group=group) == [3, 2]
    x = torch.arange(5) + 10 * which
    assert torch.equal(gather_tokens(x.split([3, 2])[rank], [3, 2], group=group), x)
    # each group has one image, on its first rank
    grid = PackedGrid([(2, 4 + which)] if rank == 0 else [])
    pixels = torch.full((grid.num_tokens, 1), float(which))
    got = encode_images(lambda x, grid: x + grid.num_tokens, pixels, grid, group=group)
    assert got.tolist() == [[which + 8.0 + 2 * which]] * grid.num_tokens


# -------------------------------------------------------------------------------------------- FSDP


def _fully_sharded(model, group):
    mesh = DeviceMesh.from_group(group, "cpu")
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _step(model, tokens, target, scale):
    """The loss of tokens, and one step down."""
    loss = ((tokens - target) ** 2).sum() * scale
    loss.backward()
    grads = [p.grad.full_tensor() if isinstance(p, DTensor) else p.grad for p in model.parameters()]
    grads = [grad.clone() for grad in grads]
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return loss.detach(), grads, [p.detach().clone() for p in model.parameters()]


@check("fully_shard around NativeViT, with and without encode_images")
def _(group):
    full = [*SIZES[:2], [(1, 4, 2)], SIZES[3]]
    few = [[(1, 8, 4)], [], [], [(1, 2, 2)]]  # too few for all to encode one
    for sizes, everywhere in ((full, False), (full, True), (SIZES, True), (few, True)):
        sizes, pixels, everything = _images(group, sizes)
        grid = PackedGrid([s for held in sizes for s in held], 2)
        alone = _model()
        target = torch.randn(grid.num_tokens // 4, CONFIG.out_size)
        scale = 1 / target.numel()
        want = _step(alone, alone(everything, grid), target, scale)

        rank = group.rank()
        shared, own = _fully_sharded(_model(), group), PackedGrid(sizes[rank], 2)
        if everywhere:
            tokens = encode_images(shared, pixels, own, group=group)
        else:
            tokens = shared(pixels, own)
        mine = _of_rank(target, sizes, rank, 4)
        # FSDP takes the mean of the gradients of ranks
        loss, grads, weights = _step(shared, tokens, mine, scale * group.size())
        dist.all_reduce(loss, group=group)
        _close(loss / group.size(), want[0], 1e-6, "loss")
        for name, *pair in zip(dict(alone.named_parameters()), grads, want[1], strict=True):
            _close(*pair, 1e-5, f"gradient of {name}")
        for name, *pair in zip(dict(alone.named_parameters()), weights, want[2], strict=True):
            _close(*pair, 1e-5, name)


# ------------------------------------------------------------------------------------------ errors


@check("arguments that do not fit", (2,))
def _(group):
    rank = group.rank()
    lengths = [4, 2]
    grid = PackedGrid([(2, 3)])
    q = torch.zeros(lengths[rank], 4, 16)
    attend = functools.partial(sequence_parallel_attention, group=group)
    arguments = {"q": q, "k": q, "v": q, "cu_seqlens": grid.cu_seqlens, "lengths": lengths}
    attend(**arguments)
    odd, three = q[:, :3], q[:, :3]
    for error, message, changes in (
        (ValueError, r"q must have heads that divide by the 2 ranks, got 3", {"q": odd}),
        (ValueError, r"k must have heads that divide by the 2 .*, got 3", {"k": three, "v": three}),
        (ValueError, r"k must have heads that divide q's 4, got 8", {"k": q.repeat(1, 2, 1)}),
        (ValueError, r"k must have shape \[\d, \*, 16\], got ", {"k": q[:1]}),
        (ValueError, r"v must have shape \[\d, 4, 16\], got ", {"v": q[:, :2]}),
        (TypeError, r"k must have the dtype of q, torch.float32, got ", {"k": q.half()}),
        (ValueError, r"q must have the \d tokens of rank \d, got ", {"lengths": [3, 3]}),
        (TypeError, r"cu_seqlens must be a tensor, got list", {"cu_seqlens": [0, 6]}),
        (ValueError, r"lengths must be 0 or more for each of 2 ranks, ", {"lengths": [6]}),
        (ValueError, r"lengths must be 0 or more for each of 2 ranks, ", {"lengths": [7, -1]}),
        (TypeError, r"lengths must be a list or tuple of integers, ", {"lengths": 3}),
        (
            ValueError,
            r"cu_seqlens must be on the device of q",
            {"cu_seqlens": grid.cu_seqlens.to("meta")},
        ),
    ):
        changes = (
            {"v": changes["k"], **changes} if message.startswith("k must have heads") else changes
        )
        with pytest.raises(error, match=message):
            attend(**{**arguments, **changes})
    with pytest.raises(TypeError, match="group must be a ProcessGroup or None, got int"):
        even_lengths(3, group=3)
    with pytest.raises(ValueError, match="num_tokens must be at least 0, got -1"):
        even_lengths(-1, group=group)
    with pytest.raises(ValueError, match=r"x must have the 6 tokens of lengths, got \[5\]"):
        shard_tokens(torch.zeros(5), lengths, group=group)
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        shard_tokens([0], lengths, group=group)
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        gather_tokens([0], lengths, group=group)
    with pytest.raises(ValueError, match=r"x must have the \d tokens of rank \d, got \[6\]"):
        gather_tokens(torch.zeros(6), lengths, group=group)

    pixels, sizes = torch.zeros(6, 4), [[(1, 2, 3)]] * 2
    encode = functools.partial(encode_images, group=group)
    for error, message, changes in (
        (TypeError, "encoder must be callable, got int", {"encoder": 3}),
        (ValueError, r"pixels must have shape \[\*, \*\]", {"pixels": torch.zeros(6)}),
        (ValueError, "pixels must have the 6 tokens of grid", {"pixels": torch.zeros(5, 4)}),
        (TypeError, "grid must be a PackedGrid, got list", {"grid": [(2, 3)]}),
        (ValueError, "sizes must be those of 2 ranks, got 1", {"sizes": sizes[:1]}),
        (TypeError, "sizes must be a list of sizes for each rank, got int", {"sizes": 3}),
        (
            ValueError,
            r"sizes\[0\]\[0\] must be \(t, h, w\) of 1 or more",
            {"sizes": [[(2, 3)], []]},
        ),
        (ValueError, r"sizes\[\d\] must be those of grid, ", {"sizes": [[(1, 3, 2)]] * 2}),
        (ValueError, "merge_size must be at least 1, got 0", {"merge_size": 0}),
        (ValueError, "grid must have rows and columns that divide by 2", {"merge_size": 2}),
        (ValueError, r"cost\[0\] must be at least 0", {"cost": lambda size: -1}),
    ):
        arguments = {"encoder": lambda x, grid: x, "pixels": pixels, "grid": grid, "sizes": sizes}
        with pytest.raises(error, match=message):
            encode(**{**arguments, **changes})

    mesh = DeviceMesh.from_group(group, "cpu")
    with pytest.raises(TypeError, match="value must be a tensor, a PackedGrid or a TokenLayout"):
        replicate([1], mesh)
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh, got ProcessGroup"):
        replicate(q, group)


def test_without_a_process_group_one_is_asked_for():
    grid = PackedGrid([(1, 1)])
    for function in (
        lambda: even_lengths(3),
        lambda: shard_tokens(torch.zeros(3), [3]),
        lambda: encode_images(lambda x, grid: x, torch.zeros(1, 1), grid),
    ):
        with pytest.raises(ValueError, match="group must exist: call "):
            function()


# ------------------------------------------------------------------------------------------- tests


@pytest.mark.skipif(patchpack.available("rope", "native") is not None, reason="slow without C++")
@pytest.mark.parametrize("ranks", [2, *slow([4])])
def test_ranks_compute_what_one_does(ranks, tmp_path):
    out = tmp_path / "errors.json"
    command = [sys.executable, __file__, str(ranks), out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = [
        f"{name}, rank {rank}:\n{error}"
        for rank, found in enumerate(json.loads(out.read_text()))
        for name, error in found.items()
    ]
    assert not errors, "\n".join(errors)


def _operators() -> list[str]:
    """Operators with an overload for each implementation: not those of integers on the host."""
    names = (n.removeprefix("patchpack::") for n in torch._C._dispatch_get_all_op_names())
    return sorted(n.partition(".")[0] for n in names if n.endswith(".native"))


@pytest.mark.parametrize("name", _operators())
def test_every_operator_has_a_rule_of_its_arguments(name):
    registered = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
    packet = getattr(torch.ops.patchpack, name)
    for overload in packet.overloads():
        assert getattr(packet, overload) in registered
    schema = getattr(packet, packet.overloads()[-1])._schema
    tensors = [a for a in schema.arguments if "Tensor" in str(a.type)]
    signatures = [rule for key, (rule, _) in RULES.items() if key.partition(",")[0] == name]
    assert signatures, f"{name} has no rule"
    for signature in signatures:
        before, after = (terms.split() for terms in signature.split("->"))
        assert (len(before), len(after)) == (len(tensors), len(schema.returns))


def test_every_op_is_tried_with_all_placements():
    assert SHARDED.keys() == SPECS.keys()
    assert {rule.partition(",")[0] for rule in RULES} == set(_operators())


def test_the_example_trains_as_one_process_does(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # any free port
    script = ROOT / "docs/distributed.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *rendezvous, script, "--steps", "3"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"step \d+: loss ([\d.]+) of 2 ranks, ([\d.]+) of one process", done.stdout)
    losses = [(float(ours), float(alone)) for ours, alone in found]
    assert len(losses) == 3
    assert losses[2][0] < losses[0][0]
    assert all(abs(ours - alone) < 1e-4 * alone for ours, alone in losses)
    assert "the losses of 2 ranks are those of one process" in done.stdout


if __name__ == "__main__":
    main()
