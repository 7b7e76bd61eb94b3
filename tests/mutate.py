"""Plants faults one by one and shows that the tests see each: ``make mutate``.

Every fault is a small edit to a copy of the tree, and the tests named for it must fail there, and
pass without it. A fault that survives is a hole in the tests; the exit status says so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("bench", "csrc", "kernels", "python", "tests")


@dataclass(frozen=True)
class Fault:
    """Replace ``old`` by ``new`` in ``file``; ``tests`` are pytest's words for what must fail."""

    what: str
    file: str
    old: str
    new: str
    tests: str


def contract(op: str, check: str = "accuracy", dtype: str = "float32") -> str:
    return f"tests/test_contract.py -k {op}-and-{check}-and-{dtype}"


def native(op: str, check: str = "accuracy") -> str:
    return f"tests/test_contract.py -k test_native[{op}-and-{check}"


def traffic(op: str, case: str, dtype: str = "float32") -> str:
    return f"tests/test_traffic.py -k ops_touch-and-{op}-and-{case}-and-{dtype}"


FAULTS = [
    Fault(
        "rope: sine with the wrong sign",
        "kernels/_rotary.py",
        "tl.fma(a, cos, -b * sin)",
        "tl.fma(a, cos, b * sin)",
        contract("rope_2d"),
    ),
    Fault(
        "rope: the last heads of an odd number are left out",
        "kernels/_rotary.py",
        "for _ in range(0, NUM_HEADS, BLOCK_H)",
        "for _ in range(0, NUM_HEADS - 1, BLOCK_H)",
        contract("rope_2d"),
    ),
    Fault(
        "resample: coordinates past 32 bits in 32 bits",
        "kernels/_resample.py",
        "axis=0) < 2.0**26",
        "axis=0) < 2.0**46",
        "tests/test_interpolate_tokens.py -k past_32_bits-and-triton",
    ),
    Fault(
        "rope: the adjoint turns forward",
        "python/patchpack/ops/rope_2d.py",
        "not ctx.inverse",
        "ctx.inverse",
        contract("rope_2d"),
    ),
    Fault(
        "rope: low word of the frequency dropped",
        "kernels/_rotary.py",
        "distance * high + tl.umulhi(distance, low)",
        "distance * high",
        contract("mrope"),
    ),
    Fault(
        "rope: quadrant boundaries shifted",
        "kernels/_rotary.py",
        "turns + 0x20000000",
        "turns",
        "tests/test_mrope.py -k exact",
    ),
    Fault(
        "rope: last token of a block dropped",
        "kernels/rope_2d.py",
        "mask_t = offs_t < num_tokens",
        "mask_t = offs_t < num_tokens - 1",
        contract("rope_2d", "fully_written"),
    ),
    Fault(
        "rope: heads past the first read the first",
        "kernels/_rotary.py",
        "        x_ptrs += step",
        "        x_ptrs += 0",
        contract("rope"),
    ),
    Fault(
        "rope: channels that pass through are lost",
        "kernels/_rotary.py",
        "if HEAD_DIM > 2 * NUM_PAIRS and",
        "if HEAD_DIM > 4 * NUM_PAIRS and",
        contract("rope", "fully_written"),
    ),
    Fault(
        "in place: heads past the first go where those of an op that allocates do",
        "kernels/_rotary.py",
        "step if IN_PLACE else BLOCK_H * HEAD_DIM",
        "BLOCK_H * HEAD_DIM",
        "tests/test_in_place.py -k bits_of_the_op_that_allocates",
    ),
    Fault(
        "in place: autograd is not told",
        "python/patchpack/ops/_in_place.py",
        "ctx.mark_dirty(qkv)",
        "pass",
        "tests/test_in_place.py -k refuses",
    ),
    Fault(
        "in place: the cotangent is overwritten",
        "python/patchpack/ops/_in_place.py",
        "grad.clone(memory_format=torch.contiguous_format)",
        "grad.contiguous()",
        "tests/test_in_place.py -k bits_of_the_op_that_allocates",
    ),
    Fault(
        "in place: the adjoint turns forward",
        "python/patchpack/ops/_in_place.py",
        "not ctx.inverse",
        "ctx.inverse",
        "tests/test_in_place.py -k bits_of_the_op_that_allocates",
    ),
    Fault(
        "in place: elements that share memory are accepted",
        "python/patchpack/ops/_in_place.py",
        "x.stride(dim) >= reach",
        "x.stride(dim) > 0",
        "tests/test_in_place.py -k bad_arguments",
    ),
    Fault(
        "in place: traced as if there were no gradient",
        "python/patchpack/ops/_in_place.py",
        'return impl == "reference" or traced',
        'return impl == "reference"',
        "tests/test_in_place.py -k compiled_has-and-native",
    ),
    Fault(
        "native, in place: the last pairs are turned twice",
        "csrc/rotary_kernels.h",
        "for_lanes(num_pairs, turn);",
        "for_lanes_again(num_pairs, turn);",
        "tests/test_in_place.py -k any_instructions",
    ),
    Fault(
        "CUDA, in place: heads go where those of an op that allocates do",
        "csrc/cuda/rotary.cuh",
        "token * h.out_stride_t",
        "token * h.num_heads * h.out_stride_h",
        "tests/test_cuda.py -k on_the_host-and-mrope-and-plain",
    ),
    Fault(
        "rope_2d: row and column swapped",
        "kernels/rope_2d.py",
        "tl.where(axis == 0, row[:, None], col[:, None])",
        "tl.where(axis == 1, row[:, None], col[:, None])",
        contract("rope_2d"),
    ),
    Fault(
        "rope_2d: frames are not told apart",
        "kernels/rope_2d.py",
        "(offs_t - first).to(tl.int32) % (num_rows * num_cols)",
        "(offs_t - first).to(tl.int32)",
        contract("rope_2d"),
    ),
    Fault(
        "rope_2d: search for the image ends one step early",
        "kernels/rope_2d.py",
        "max(num_grids - 1, 0).bit_length()",
        "max(num_grids - 2, 0).bit_length()",
        contract("rope_2d"),
    ),
    Fault(
        "merge-block order: position in the block transposed",
        "kernels/_tiles.py",
        "MERGE + in_block // MERGE",
        "MERGE + in_block % MERGE",
        contract("rope_2d"),
    ),
    Fault(
        "rope_2d: head stride ignored for strided inputs",
        "kernels/_rotary.py",
        "q, k = last_contiguous(q), last_contiguous(k)",
        "q, k = (x.as_strided(x.shape, torch.empty_like(x.contiguous()).stride()) for x in (q, k))",
        contract("rope_2d", "strided"),
    ),
    Fault(
        "rope_2d: a token after the first of another image stays in its own",
        "kernels/_tiles.py",
        "grid += (begin <= tokens).to(tl.int32)",
        "grid += (begin < tokens).to(tl.int32)",
        contract("rope_2d"),
    ),
    Fault(
        "rope_2d: token offsets in 32 bits",
        "kernels/_rotary.py",
        "(offs_t * stride_x_t + offs_h.to(tl.int64) * stride_x_h) * STRIDE_UNIT",
        "((offs_t * stride_x_t).to(tl.int32) + offs_h * stride_x_h) * STRIDE_UNIT",
        contract("rope_2d", "int64"),
    ),
    Fault(
        "mrope: section boundary off by one",
        "kernels/mrope.py",
        "for axis, count in enumerate(sections) for _ in range(count)]",
        "for axis, count in enumerate((sections[0] + 1, sections[1] - 1, sections[2]))"
        " for _ in range(count)]",
        contract("mrope"),
    ),
    Fault(
        "mrope: text row taken for time",
        "kernels/mrope.py",
        "positions = position_ids[-3:]",
        "positions = position_ids[:3]",
        contract("mrope"),
    ),
    Fault(
        "mrope: a device value read on the host",
        "python/patchpack/ops/mrope.py",
        "    if position_ids.shape[0] not in (3, 4):",
        "    position_ids.max().item()\n    if position_ids.shape[0] not in (3, 4):",
        contract("mrope", "sync"),
    ),
    Fault(
        "mrope: a device value read on the host in the backward pass",
        "python/patchpack/ops/mrope.py",
        "def _backward(ctx, grad_q, grad_k):\n",
        "def _backward(ctx, grad_q, grad_k):\n    bool(grad_q.any())\n",
        contract("mrope", "sync"),
    ),
    Fault(
        "interpolate_tokens: half-pixel offset dropped",
        "kernels/_resample.py",
        "offset, unit = 2 * num_in, num_in - num_out,",
        "offset, unit = 2 * num_in, num_in - num_in,",
        contract("interpolate_tokens"),
    ),
    Fault(
        "native: bfloat16 halves of a vector swapped",
        "csrc/vec.h",
        "(Floats)(even >> 16 | (odd & 0xFFFF0000u))",
        "(Floats)(odd >> 16 | (even & 0xFFFF0000u))",
        native("interpolate_tokens"),
    ),
    Fault(
        "native: four terms share a weight",
        "csrc/resample_kernels.h",
        "weights[k] = splat(terms.weights[k]);",
        "weights[k] = splat(terms.weights[0]);",
        native("interpolate_tokens"),
    ),
    Fault(
        "native: rows and columns of a resized grid swapped",
        "csrc/metadata.cpp",
        "resized.add({g.frames, target[0], target[1], merge});",
        "resized.add({g.frames, target[1], target[0], merge});",
        "tests/test_packing.py -k resized_grid",
    ),
    Fault(
        "a grid of other frames is a target",
        "python/patchpack/packing/_grid.py",
        "if not np.array_equal(frames, want):",
        "if len(frames) != len(want):",
        "tests/test_packing.py -k no_target",
    ),
    Fault(
        "interpolate_tokens: what lies past a border is another row",
        "kernels/interpolate_tokens.py",
        "tap_x = tl.minimum(tl.maximum(tap_x, 0), cols - 1)",
        "tap_x = tl.minimum(tap_x, cols - 1)",
        contract("interpolate_tokens"),
    ),
    Fault(
        "interpolate_tokens: the adjoint misses its last reader",
        "kernels/interpolate_tokens.py",
        "range(tl.max(count_x))",
        "range(tl.max(count_x) - 1)",
        contract("interpolate_tokens"),
    ),
    Fault(
        "interpolate_tokens: gradient not normalised",
        "kernels/interpolate_tokens.py",
        "weight *= tl.load(saved_ptrs + token, mask=weight != 0.0, other=0.0)",
        "weight *= 1.0",
        contract("interpolate_tokens"),
    ),
    Fault(
        "interpolate_tokens: frames read the first frame",
        "kernels/interpolate_tokens.py",
        "+ frame * (other_rows * other_cols)",
        "+ 0 * frame",
        contract("interpolate_tokens"),
    ),
    Fault(
        "interpolate_tokens: order of the result ignored",
        "kernels/interpolate_tokens.py",
        "TARGET_MERGE=target_merge_size",
        "TARGET_MERGE=1",
        contract("interpolate_tokens"),
    ),
    Fault(
        "interpolate_tokens: bicubic with another A",
        "kernels/_resample.py",
        "-0.5 if ANTIALIAS else -0.75",
        "-0.75",
        contract("interpolate_tokens"),
    ),
    Fault(
        "interpolate_tokens: a maximum gives its gradient to all readers",
        "kernels/interpolate_tokens.py",
        "grad = tl.where(argmax == in_frame[:, None], grad, 0.0)",
        "grad = grad + 0.0 * argmax",
        contract("interpolate_tokens"),
    ),
    Fault(
        "interpolate_tokens: offsets of gradients in 32 bits",
        "kernels/interpolate_tokens.py",
        "token = cell_to_token(out_y, out_x, out_cols, TARGET_MERGE).to(tl.int64)",
        "token = cell_to_token(out_y, out_x, out_cols, TARGET_MERGE)",
        contract("interpolate_tokens", "int64"),
    ),
    Fault(
        "add_pos_embed: rows and columns of the table swapped",
        "kernels/add_pos_embed.py",
        "        table.shape[0],\n        table.shape[1],\n",
        "        table.shape[1],\n        table.shape[0],\n",
        contract("add_pos_embed"),
    ),
    Fault(
        "add_pos_embed: order of the tokens ignored in the gradient",
        "kernels/add_pos_embed.py",
        "cell_to_token(out_y, out_x, out_cols, MERGE)",
        "cell_to_token(out_y, out_x, out_cols, 1)",
        contract("add_pos_embed"),
    ),
    Fault(
        "add_pos_embed: the gradient takes the first frame of a chunk only",
        "kernels/add_pos_embed.py",
        "range(chunk // grid_chunks, num_frames, frame_chunks)",
        "range(chunk // grid_chunks, tl.minimum(num_frames, frame_chunks), frame_chunks)",
        contract("add_pos_embed"),
    ),
    Fault(
        "add_pos_embed: every chunk takes all frames",
        "kernels/add_pos_embed.py",
        "range(chunk // grid_chunks, num_frames, frame_chunks)",
        "range(0, num_frames)",
        contract("add_pos_embed"),
    ),
    Fault(
        "add_pos_embed: gradient not normalised",
        "kernels/add_pos_embed.py",
        "weight *= scale",
        "weight *= 1.0",
        contract("add_pos_embed"),
    ),
    Fault(
        "add_pos_embed: digits lost in long sums",
        "kernels/add_pos_embed.py",
        "frame_acc -= lost",
        "frame_acc -= 0.0 * lost",
        "tests/test_add_pos_embed.py -k lose_digits",
    ),
    Fault(
        "add_pos_embed: what lies past a border is left out of the gradient",
        "kernels/add_pos_embed.py",
        "borders_y = (row == 0) | (row == rows - 1)",
        "borders_y = row == 0",
        contract("add_pos_embed"),
    ),
    Fault(
        "assemble: tiles stand in columns",
        "kernels/assemble.py",
        "tile = y // tile_rows * num_beside + x // tile_cols",
        "tile = y // tile_rows + x // tile_cols * num_beside",
        contract("assemble"),
    ),
    Fault(
        "assemble: search for the part ends one step early",
        "kernels/assemble.py",
        "max(num_parts - 1, 0).bit_length()",
        "max(num_parts - 2, 0).bit_length()",
        contract("assemble"),
    ),
    Fault(
        "assemble: what is cropped gets a gradient",
        "kernels/assemble.py",
        "is_read = is_read & (row >= 0) & (row < height) & (col >= 0) & (col < width)",
        "is_read = is_read & (row >= 0) & (col >= 0)",
        contract("assemble"),
    ),
    Fault(
        "assemble: the adjoint forgets newlines",
        "kernels/assemble.py",
        "length = out_cols + (newline >= 0)",
        "length = out_cols + (newline >= 2**30)",
        contract("assemble"),
    ),
    Fault(
        "assemble: weights of zero are read",
        "kernels/assemble.py",
        "read = (mask_t & ~is_vector & (weight != 0.0))",
        "read = (mask_t & ~is_vector)",
        "tests/test_assemble.py -k keeps_nan_out",
    ),
    Fault(
        "assemble: a copied zero loses its sign",
        "kernels/assemble.py",
        "nothing = tl.zeros((BLOCK_T, BLOCK_C), tl.float32) * -1.0",
        "nothing = tl.zeros((BLOCK_T, BLOCK_C), tl.float32) * 1.0",
        "tests/test_assemble.py -k not_resized",
    ),
    Fault(
        "assemble: joined images all read the first",
        "python/patchpack/layout.py",
        "replace(part, first=part.first + shift)",
        "replace(part, first=part.first + 0 * shift)",
        "tests/test_layout.py",
    ),
    Fault(
        "assemble, scatter_tokens: sums leave out the last pieces",
        "kernels/_sums.py",
        "for first in range(0, num_pieces, BLOCK_P):",
        "for first in range(0, 1, BLOCK_P):",
        "tests/test_assemble.py -k long_sequence",
    ),
    Fault(
        "assemble, scatter_tokens: sums see a piece's neighbour",
        "kernels/_sums.py",
        "mask=offs_r < end, other=-1",
        "mask=offs_r < num_rows, other=-1",
        "tests/test_assemble.py -k long_sequence",
    ),
    Fault(
        "scatter_tokens: replaced rows pass their gradient on",
        "kernels/scatter_tokens.py",
        "source == token + num_vectors, source < 0)",
        "source == token + num_vectors, source < num_vectors)",
        contract("scatter_tokens"),
    ),
    Fault(
        "scatter_tokens: a token that lost its row gets a gradient",
        "kernels/scatter_tokens.py",
        "source == token + num_vectors, source < 0)",
        "source >= num_vectors, source < 0)",
        "tests/test_scatter_tokens.py -k touch_nothing_else",
    ),
    Fault(
        "scatter_tokens: a token without a row takes the first",
        "kernels/scatter_tokens.py",
        "mask = mask & (rows >= 0) & (rows < num_rows)",
        "rows = tl.maximum(rows, 0)\n    mask = mask & (rows < num_rows)",
        "tests/test_scatter_tokens.py -k touch_nothing_else",
    ),
    Fault(
        "scatter_tokens: a batch is read as if without gaps",
        "kernels/_tiles.py",
        "batch.to(tl.int64) * stride_batch",
        "batch.to(tl.int64) * num_rows * stride_row",
        "tests/test_scatter_tokens.py -k batch_of_views",
    ),
    Fault(
        "scatter_tokens: offsets of gradients in 32 bits",
        "kernels/_tiles.py",
        "return ptr + offsets * STRIDE_UNIT",
        "return ptr + (offsets * STRIDE_UNIT).to(tl.int32)",
        contract("scatter_tokens", "int64"),
    ),
    Fault(
        "patchify: row and column of the patch swapped",
        "kernels/patchify.py",
        "y * stride_y + x * stride_x",
        "x * stride_y + y * stride_x",
        contract("patchify"),
    ),
    Fault(
        "patchify: the last frame is not repeated",
        "kernels/patchify.py",
        "end = tl.where(frame == frames - 1, TEMPORAL, time + 1)",
        "end = time + 1",
        contract("patchify"),
    ),
    Fault(
        "patchify: pixels that fill no patch are given a gradient",
        "kernels/patchify.py",
        "& (col < cols)[None, :]",
        "& (col <= cols)[None, :]",
        contract("patchify"),
    ),
    Fault(
        "patchify: bytes divided by 256",
        "kernels/patchify.py",
        "divide(value, 255.0)",
        "divide(value, 256.0)",
        contract("patchify"),
    ),
    Fault(
        "patchify: search for the image ends one step early",
        "kernels/patchify.py",
        "(len(images) - 1).bit_length()",
        "max(len(images) - 2, 0).bit_length()",
        contract("patchify"),
    ),
    Fault(
        "patchify: tables are copied with a wait",
        "kernels/_tiles.py",
        "pinned.to(device, non_blocking=True)",
        "pinned.to(device)",
        contract("patchify", "sync"),
    ),
    Fault(
        "resize_images: sums cut off instead of rounded",
        "kernels/resize_images.py",
        "HALF: tl.constexpr = 1 << (BITS - 1)",
        "HALF: tl.constexpr = 0",
        contract("resize_images"),
    ),
    Fault(
        "resize_images: sums past white wrap around",
        "kernels/resize_images.py",
        "tl.minimum(tl.maximum(total >> BITS, 0), 255)",
        "(total >> BITS)",
        contract("resize_images"),
    ),
    Fault(
        "resize_images: offsets of channels in 32 bits",
        "kernels/resize_images.py",
        "(plane % num_channels) * tl.load(entry_ptr + 7)",
        "(plane % num_channels) * tl.load(entry_ptr + 7).to(tl.int32)",
        contract("resize_images", "int64"),
    ),
    Fault(
        "resize_images: the width always goes first",
        "python/patchpack/_resampling.py",
        "return fewer_rows > max(2 * fewer_columns, 0)",
        "return False",
        "tests/test_resize_images.py -k height_goes_first",
    ),
    Fault(
        "resize_images: weights not rounded",
        "python/patchpack/_resampling.py",
        "np.trunc(fixed + np.copysign(0.5, fixed))",
        "np.trunc(fixed)",
        "tests/test_resize_images.py -k bytes_are",
    ),
    Fault(
        "varlen_attention: keys past the segment are seen",
        "kernels/varlen_attention.py",
        "visible = j < length",
        "visible = j < length + 1",
        contract("varlen_attention"),
    ),
    Fault(
        "varlen_attention: window one key too wide",
        "kernels/varlen_attention.py",
        "visible = visible & (j >= i - left)",
        "visible = visible & (j >= i - left - 1)",
        contract("varlen_attention"),
    ),
    Fault(
        "varlen_attention: tiles in full view end too late",
        "kernels/varlen_attention.py",
        "full_end = tl.maximum(tl.minimum(end, first + right + 1), 0)",
        "full_end = tl.maximum(tl.minimum(end, first + right + BLOCK), 0)",
        contract("varlen_attention"),
    ),
    Fault(
        "varlen_attention: search for the segment ends one step early",
        "kernels/varlen_attention.py",
        "        num_segments.bit_length(),",
        "        num_segments.bit_length() - 1,",
        contract("varlen_attention"),
    ),
    Fault(
        "varlen_attention: sum of the softmax not rescaled",
        "kernels/varlen_attention.py",
        "total = total * shrink + tl.sum(p, axis=1)",
        "total = total + tl.sum(p, axis=1)",
        contract("varlen_attention"),
    ),
    Fault(
        "varlen_attention: second piece of a head left out of the scores",
        "kernels/varlen_attention.py",
        "s = tl.dot(x[1], tl.trans(y[1]), s, input_precision=PRECISION)",
        "s = tl.dot(x[1], tl.trans(y[1]), s, input_precision=PRECISION) * 0 + s",
        contract("varlen_attention", dtype="bfloat16"),
    ),
    Fault(
        "varlen_attention: query heads read another group's keys",
        "kernels/varlen_attention.py",
        "k_ptr = _head_of(k_ptr, begin_k, stride_k_t, head // GROUP, stride_k_h, STRIDE_UNIT)",
        "k_ptr = _head_of(k_ptr, begin_k, stride_k_t, head % (NUM_HEADS // GROUP), stride_k_h,"
        " STRIDE_UNIT)",
        "tests/test_varlen_attention.py",
    ),
    Fault(
        "varlen_attention: keys and queries aligned at their starts",
        "kernels/varlen_attention.py",
        "shift = len_k - len_q  # query i stands at key i + shift",
        "shift = 0 * len_k",
        contract("varlen_attention"),
    ),
    Fault(
        "varlen_attention: gradient of lse dropped",
        "kernels/varlen_attention.py",
        "HAS_GRAD_LSE=grad_lse is not None",
        "HAS_GRAD_LSE=False",
        contract("varlen_attention"),
    ),
    Fault(
        "varlen_attention: gradients of a group's other heads left out",
        "kernels/varlen_attention.py",
        "for in_group in range(GROUP):",
        "for in_group in range(1):",
        contract("varlen_attention"),
    ),
    Fault(
        "varlen_attention: rounding of delta not made up for in float32",
        "kernels/varlen_attention.py",
        "        delta += excess\n",
        "",
        "tests/test_varlen_attention.py -k sees_one_key",
    ),
    Fault(
        "varlen_attention: the one loop over a window's queries begins at those in full view",
        "kernels/varlen_attention.py",
        "bounds[0 if ONE_LOOP else part]",
        "bounds[part]",
        contract("varlen_attention"),
    ),
    Fault(
        "varlen_attention: rows past the end see each other",
        "kernels/varlen_attention.py",
        "_rows_of(cu_seqlens_k_ptr, segment, num_segments, num_k_tokens, False)",
        "_rows_of(cu_seqlens_k_ptr, segment, num_segments, num_k_tokens, True)",
        "tests/test_varlen_attention.py -k past_the_end",
    ),
    Fault(
        "varlen_attention, split: a chunk goes on into the next",
        "kernels/varlen_attention.py",
        "_within(bounds, chunk, chunk + CHUNK)",
        "_within(bounds, chunk, chunk + 2 * CHUNK)",
        "tests/test_varlen_attention.py -k split_keys_are",
    ),
    Fault(
        "varlen_attention, split: parts are summed without their weights",
        "kernels/varlen_attention.py",
        "part *= weight[:, None]",
        "part *= 1.0",
        "tests/test_varlen_attention.py -k split_keys_are",
    ),
    Fault(
        "varlen_attention, split: fewer numbers than chunks",
        "kernels/varlen_attention.py",
        "num_segments, search_steps, number, CHUNK // 2, EACH=0",
        "num_segments, search_steps, number, CHUNK * 2, EACH=0",
        "tests/test_varlen_attention.py -k split_keys_are",
    ),
    Fault(
        "varlen_attention, split: it depends on what is packed with it",
        "kernels/varlen_attention.py",
        "(len_q <= BLOCK_Q) & (len_k > CHUNK)",
        "(len_q <= BLOCK_Q) & (len_k > 0)",
        "tests/test_varlen_attention.py -k split",
    ),
    Fault(
        "varlen_attention, split: parts past the last are read",
        "kernels/varlen_attention.py",
        "tl.minimum(tl.cdiv(len_k, CHUNK), tl.num_programs(0) // NUM_HEADS - number.to(tl.int32))",
        "tl.cdiv(len_k, CHUNK) + 1",
        "tests/test_varlen_attention.py -k split",
    ),
    Fault(
        "varlen_attention, rotated: partners with the wrong sign",
        "kernels/varlen_attention.py",
        "tl.where(channel < HEAD_DIM // 2, -y, y)",
        "tl.where(channel < HEAD_DIM // 2, y, -y)",
        "tests/test_varlen_attention.py -k rotated_is_rope_2d-and-triton-and-64",
    ),
    Fault(
        "varlen_attention, rotated: heads past the first part are left out",
        "kernels/varlen_attention.py",
        "(tiles, triton.cdiv(num_heads, heads_a_part))",
        "(tiles, 1)",
        "tests/test_varlen_attention.py -k rotated_is_rope_2d-and-triton-and-64",
    ),
    Fault(
        "varlen_attention, rotated: gradients are not rotated back",
        "python/patchpack/ops/varlen_attention.py",
        "*ctx.rotation, True)",
        "*ctx.rotation, False)",
        "tests/test_varlen_attention.py -k rotated_is_rope_2d-and-triton-and-64",
    ),
    Fault(
        "varlen_attention: offsets in 32 bits",
        "kernels/varlen_attention.py",
        "return ptr + first * stride_t.to(tl.int64) * STRIDE_UNIT + near * STRIDE_UNIT",
        "return ptr + (first * stride_t * STRIDE_UNIT).to(tl.int32) + near * STRIDE_UNIT",
        "tests/test_varlen_attention.py -k far_apart",
    ),
    Fault(
        "varlen_attention: queries without keys pass NaN on",
        "kernels/varlen_attention.py",
        "        begin_q += without\n        len_q -= without\n        shift += without\n",
        "        shift += 0 * without\n",
        "tests/test_varlen_attention.py -k pass_no_nan_on",
    ),
    Fault(
        "varlen_attention: a window taken as it comes overflows",
        "python/patchpack/_check.py",
        "[-1 if side >= 2**30 else side for side in pair]",
        "[min(side, 2**31 - 1) for side in pair]",
        "tests/test_varlen_attention.py -k larger_than_any",
    ),
    Fault(
        "varlen_attention: views are copied",
        "kernels/varlen_attention.py",
        "return last_contiguous(x) if x.stride(0) < 2**25 else x.contiguous()",
        "return x.contiguous()",
        contract("varlen_attention", "strided"),
    ),
    Fault(
        "varlen_attention: a head of 80 is padded to 128",
        "kernels/_attention_tiles.py",
        "return (first, rest) if rest & (rest - 1) == 0 else (2 * first, 0)",
        "return (first, 0) if rest == 0 else (2 * first, 0)",
        "tests/test_varlen_attention.py -k padding",
    ),
    Fault(
        "region_attention: what neighbours share is not taken out",
        "kernels/region_attention.py",
        "return x - (tl.sum(x, axis=1) * (1.0 / AREA))[:, None, :]",
        "return x",
        "tests/test_region_attention.py -k alike_neighbours",
    ),
    Fault(
        "region_attention: softmax not normalised",
        "kernels/region_attention.py",
        "p *= tl.div_rn(1.0, tl.sum(p, axis=1))[:, None]",
        "p *= 1.0 / AREA",
        contract("region_attention"),
    ),
    Fault(
        "region_attention: mean of the cell left out of the gradient",
        "kernels/region_attention.py",
        "    weight = 1.0 / AREA + p\n\n    # grad_q",
        "    weight = p\n\n    # grad_q",
        contract("region_attention"),
    ),
    Fault(
        "region_attention: later channels read the first",
        "kernels/region_attention.py",
        "q = tl.load(query_ptrs + c, mask=mask_n[:, None] & mask_c",
        "q = tl.load(query_ptrs, mask=mask_n[:, None] & mask_c",
        contract("region_attention"),
    ),
    Fault(
        "region_attention: cells read across blocks as if in raster order",
        "kernels/region_attention.py",
        "MERGE=spatial_merge_size",
        "MERGE=1",
        contract("region_attention"),
    ),
    Fault(
        "region_attention: offsets of tokens in 32 bits",
        "kernels/region_attention.py",
        "token_ptrs = (tokens_ptr + token * stride",
        "token_ptrs = (tokens_ptr + token.to(tl.int32) * stride",
        contract("region_attention", "int64"),
    ),
    Fault(
        "merge_tokens: blocks by columns read by rows",
        "kernels/_tiles.py",
        "    if BY_COLUMN:\n",
        "    if False:\n",
        contract("merge_tokens"),
    ),
    Fault(
        "merge_tokens: variance in one pass",
        "kernels/merge_tokens.py",
        "squares / COUNT + eps",
        "squares / COUNT + mean * mean - mean * mean + eps",
        "tests/test_merge_tokens.py -k large_mean",
    ),
    Fault(
        "merge_tokens: the gradient leaves out what the variance gives",
        "kernels/merge_tokens.py",
        "(w - mean_w - z * mean_wz) * rstd",
        "(w - mean_w + 0 * mean_wz) * rstd",
        contract("merge_tokens"),
    ),
    Fault(
        "merge_tokens: only the last part of a row counts",
        "kernels/merge_tokens.py",
        "total_wz += tl.sum(tl.sum(w * z, axis=2), axis=1)",
        "total_wz = tl.sum(tl.sum(w * z, axis=2), axis=1)",
        contract("merge_tokens"),
    ),
    Fault(
        "merge_tokens: partial sums past the first 32 are lost",
        "kernels/merge_tokens.py",
        "        at += BLOCK_P * NUM_WEIGHTS\n",
        "",
        "tests/test_merge_tokens.py -k many_partial",
    ),
    Fault(
        "packing: merging what does not divide",
        "python/patchpack/packing/_grid.py",
        "(sizes[:, 1:] % merge_size).any(axis=1)",
        "(sizes[:, 1:] % merge_size).all(axis=1)",
        "tests/test_packing.py -k not_merged",
    ),
    Fault(
        "packing: segments of a clip merged where frames are meant",
        "python/patchpack/packing/_grid.py",
        "    if merge_temporal:\n",
        "    if not merge_temporal:\n",
        "tests/test_packing.py",
    ),
    Fault(
        "packing: a resized clip falls apart into frames",
        "python/patchpack/packing/_grid.py",
        "_build(sizes, None, spatial_merge_size, self.merge_temporal, device)",
        "_build(sizes, None, spatial_merge_size, False, device)",
        "tests/test_packing.py",
    ),
    Fault(
        "pack: the shortest sample goes first",
        "python/patchpack/packing/_pack.py",
        "key=tokens.__getitem__, reverse=True",
        "key=tokens.__getitem__",
        "tests/test_pack.py -k best_fit",
    ),
    Fault(
        "pack: a sample goes where it leaves the most room",
        "python/patchpack/packing/_pack.py",
        "at = bisect_left(rooms, tokens[i])",
        "at = max(bisect_left(rooms, tokens[i]), len(rooms) - 1)",
        "tests/test_pack.py -k best_fit",
    ),
    Fault(
        "pack: sequences in the order in which they were opened",
        "python/patchpack/packing/_pack.py",
        "tuple(sorted(tuple(sorted(samples)) for samples in bins))",
        "tuple(tuple(sorted(samples)) for samples in bins)",
        "tests/test_pack.py -k keep_the_order",
    ),
    Fault(
        "balance: images are taken as they come",
        "python/patchpack/packing/_balance.py",
        "sorted(range(len(costs)), key=costs.__getitem__, reverse=True)",
        "range(len(costs))",
        "tests/test_balance.py -k busier",
    ),
    Fault(
        "balance: frames attend to each other",
        "python/patchpack/packing/_balance.py",
        "squares += frames * (rows * cols) ** 2",
        "squares += (frames * rows * cols) ** 2",
        "tests/test_balance.py -k by_hand",
    ),
    Fault(
        "video: frames that need what was jumped over are kept",
        "python/patchpack/video.py",
        "if f.pts is not None and f.pts >= time",
        "if f.pts is not None",
        "tests/test_video.py -k decoding_everything",
    ),
    Fault(
        "video: frames that are not shown are counted",
        "python/patchpack/video.py",
        "if p.size and not p.is_discard",
        "if p.size",
        "tests/test_video.py -k probe_counts",
    ),
    Fault(
        "video: a decoder that gives other frames goes unnoticed",
        "python/patchpack/video.py",
        "if frame is None or frame.pts != shown",
        "if frame is None or not shown",
        "tests/test_video.py -k disagrees",
    ),
    Fault(
        "video: a clip that was cut is trusted",
        "python/patchpack/video.py",
        'if shown["seek"][0] == _UNKNOWN or',
        "if False and",
        "tests/test_video.py -k from_an_open_group or without_its_keyframe or edit_list",
    ),
    Fault(
        "video: turned the other way",
        "python/patchpack/video.py",
        "90: PIL.Image.Transpose.ROTATE_90,",
        "90: PIL.Image.Transpose.ROTATE_270,",
        "tests/test_video.py -k turned",
    ),
    Fault(
        "video: all frames are read at once",
        "python/patchpack/video.py",
        "zip(frames, wanted.values(), strict=True)",
        "zip(list(frames), wanted.values(), strict=True)",
        "tests/test_video.py -k long_clip",
    ),
    Fault(
        "metadata: a window at the bottom counted as high as the others",
        "python/patchpack/metadata.py",
        "    height = (rows - side * band).clamp(max=side)\n    before",
        "    height = side\n    before",
        "tests/test_metadata.py -k windows",
    ),
    Fault(
        "metadata: a window at the right read as wide as the others",
        "python/patchpack/metadata.py",
        "width = (cols - side * window).clamp(max=side)",
        "width = side",
        "tests/test_metadata.py -k windows",
    ),
    Fault(
        "metadata: a device is read to count its tokens",
        "python/patchpack/metadata.py",
        "    if length is not None:\n        return",
        "    if length is not None and not grid_thw.numel():\n        return",
        "tests/test_metadata.py -k not_waited_for",
    ),
    Fault(
        "metadata: bounds beyond the tokens",
        "python/patchpack/packing/_grid.py",
        "(first + frame * rows * cols).clamp(max=geometry[-1, 0]).int()",
        "(first + frame * rows * cols).int()",
        "tests/test_metadata.py -k stays_within",
    ),
    Fault(
        "metadata: seconds and their tokens multiplied first",
        "python/patchpack/metadata.py",
        "frame * seconds * tokens_per_second",
        "frame * (seconds * tokens_per_second)",
        "tests/test_metadata.py -k own_dtype",
    ),
    Fault(
        "metadata: text after a video starts after its frames, not their seconds",
        "python/patchpack/metadata.py",
        "torch.maximum(time_of(frames - 1) + 1,",
        "torch.maximum(frames,",
        "tests/test_metadata.py -k seconds",
    ),
    Fault(
        "metadata: frames apart taken for videos",
        "python/patchpack/metadata.py",
        "if split_frames and video_grid_thw is not None:",
        "if split_frames and video_grid_thw is None:",
        "tests/test_metadata.py -k frames_apart",
    ),
    Fault(
        "qwen2_5_vl: seconds of all frames, not of those that are used",
        "python/patchpack/systems/qwen2_5_vl.py",
        "plan.num_frames / int(total_frames) * video_fps",
        "video_fps",
        "tests/test_qwen2_5_vl.py -k seconds",
    ),
    Fault(
        "qwen3_vl: the time of a patch is that of its first frame",
        "python/patchpack/systems/qwen3_vl.py",
        "tuple((first + last) / 2 for first, last in patches)",
        "tuple(first for first, last in patches)",
        "tests/test_qwen3_vl.py -k text_of_a_video",
    ),
    Fault(
        "qwen3_vl: frames fit the budget of a video one by one",
        "python/patchpack/systems/qwen3_vl.py",
        "math.sqrt(num_frames * height * width / max_pixels)",
        "math.sqrt(height * width / max_pixels)",
        "tests/test_qwen3_vl.py -k smart_resize",
    ),
    Fault(
        "native rope: the adjoint turns forward",
        "csrc/rotary_kernels.h",
        "if (r.inverse)",
        "if (false)",
        native("rope"),
    ),
    Fault(
        "native rope: the tail of a head starts one pair late",
        "csrc/vec.h",
        "body(size - kLanes, All{});",
        "body(size - kLanes + 1, All{});",
        native("rope_2d"),
    ),
    Fault(
        "native rope: interleaved pairs stored the wrong way round",
        "csrc/rotary_kernels.h",
        "interleaved_lower(a_out, b_out",
        "interleaved_lower(b_out, a_out",
        native("rope"),
    ),
    Fault(
        "native rope_2d: merge-block order read as raster",
        "csrc/rope_2d.h",
        "token_to_cell(in_frame, width, merge)",
        "token_to_cell(in_frame, width, 1)",
        native("rope_2d"),
    ),
    Fault(
        "native mrope: low word of the frequency dropped",
        "csrc/angles.h",
        "(uint32_t)(((uint64_t)distance * low) >> 32)",
        "0u",
        "tests/test_mrope.py -k exact",
    ),
    Fault(
        "native mrope: rows of four positions counted from the first",
        "csrc/rotary.h",
        "(ids.size(0) - 3) * ids.stride(0)",
        "0 * ids.stride(0)",
        native("mrope"),
    ),
    Fault(
        "native varlen_attention: sum of the softmax not rescaled",
        "csrc/varlen_attention.h",
        "store(sums, load(sums) * shrink);",
        "",
        "tests/test_varlen_attention.py -k many_blocks",
    ),
    Fault(
        "native varlen_attention: keys in full view end one too late",
        "csrc/varlen_attention.cpp",
        "full_end(s.end_key(first))",
        "full_end(s.end_key(first) + 1)",
        "tests/test_varlen_attention.py -k many_blocks",
    ),
    Fault(
        "native varlen_attention: the last row of an odd number is paired with what follows",
        "csrc/gemm_tiles.h",
        "rows > 1 ? _mm256_maskz_loadu_epi16(mask, x + stride) : __m256i{}",
        "_mm256_maskz_loadu_epi16(mask, x + stride)",
        "tests/test_varlen_attention.py -k neighbours",
    ),
    Fault(
        "native interpolate_tokens: weights of columns left out",
        "csrc/resample_kernels.h",
        "y->weight * x->weight",
        "y->weight",
        native("interpolate_tokens"),
    ),
    Fault(
        "native interpolate_tokens: NaN loses to a maximum",
        "csrc/interpolate_tokens.h",
        "(v > most) | (v != v)",
        "v > most",
        "tests/test_interpolate_tokens.py -k first_maximum",
    ),
    Fault(
        "native interpolate_tokens: what goes past the caches is lost",
        "csrc/vec.h",
        "_mm512_stream_si512((__m512i*)out, (__m512i)bits)",
        "(void)out",
        "tests/test_interpolate_tokens.py -k more_than_caches_hold",
    ),
    Fault(
        "native add_pos_embed: past the caches, though rows are no cache lines",
        "csrc/past_caches.h",
        "return aligned && ",
        "return ",
        "tests/test_add_pos_embed.py -k more_than_caches_hold",
    ),
    Fault(
        "native scatter_tokens: bytes copied past the caches start too late",
        "csrc/vec.h",
        "std::memcpy(to, from, i);",
        "std::memcpy(to, from, i++);",
        "tests/test_scatter_tokens.py -k more_than_caches_hold",
    ),
    Fault(
        "native add_pos_embed: what a sum over frames loses is forgotten",
        "csrc/add_pos_embed.h",
        "lost = (after - sum) - term;",
        "lost = Floats{};",
        "tests/test_add_pos_embed.py -k many_frames",
    ),
    Fault(
        "native region_attention: tokens not counted from their mean",
        "csrc/region_attention.h",
        "load(cell.x[k] + i, n) - load(mean + i, n)",
        "load(cell.x[k] + i, n)",
        "tests/test_region_attention.py -k alike_neighbours",
    ),
    Fault(
        "native merge_tokens: the norm's gradient without what goes along z",
        "csrc/merge_tokens.h",
        "(w - mean_w - z * mean_wz) * rstd",
        "(w - mean_w) * rstd",
        native("merge_tokens"),
    ),
    Fault(
        "native patchify: a last frame that stands alone is not repeated",
        "csrc/patchify_kernels.h",
        "? 1 : patch_.temporal - frame",
        "? 1 : 1",
        native("patchify", "fully_written"),
    ),
    Fault(
        "native resize_images: of many taps, cut off instead of rounded",
        "csrc/resize_kernels.h",
        "(total + kHalf) >> kWeightBits",
        "total >> kWeightBits",
        "tests/test_resize_images.py -k bytes_of_pillow",
    ),
    Fault(
        "native resize_images: of few taps, cut off instead of rounded",
        "csrc/resize_kernels.h",
        "Ints{} + (kHalf >> ((kParts - 1) * kPartBits))",
        "Ints{}",
        "tests/test_resize_images.py -k bytes_of_pillow",
    ),
    Fault(
        "native resize_patchify: every strip is the first",
        "csrc/resize_patchify.h",
        "top = strip.row * height",
        "top = 0",
        "tests/test_patchify.py -k native_resampling",
    ),
    Fault(
        "native resize_patchify: a strip is overwritten while it is cut",
        "csrc/resize_patchify.h",
        "half = patch.temporal - half;",
        "",
        "tests/test_patchify.py -k native_resampling",
    ),
    Fault(
        "native resize_patchify: the last strip is not cut",
        "csrc/resize_patchify.h",
        "  cutter.finish();\n  fence();",
        "  fence();",
        "tests/test_patchify.py -k native_resampling",
    ),
    Fault(
        "native assemble: every row ends with the first vector",
        "csrc/assemble.h",
        "vectors.at(part.newline)",
        "vectors.at(0)",
        native("assemble"),
    ),
    Fault(
        "native scatter_tokens: an index beyond the sequence is followed",
        "csrc/scatter_tokens.cpp",
        "if (rows[i] >= 0 && rows[i] < num_rows)",
        "if (rows[i] >= 0)",
        "tests/test_scatter_tokens.py -k touch_nothing_else",
    ),
    Fault(
        "native sums: only the last few rows count",
        "csrc/sums_kernels.h",
        "all[c] += few[c]",
        "all[c] = few[c]",
        "tests/test_assemble.py -k long_sequence",
    ),
    Fault(
        "native metadata: rows and columns of positions exchanged",
        "csrc/metadata.cpp",
        "put(token, base + t, base + row, base + col)",
        "put(token, base + t, base + col, base + row)",
        "tests/test_metadata.py -k positions_are_those_of_the_loop",
    ),
    Fault(
        "cuda rope_2d: groups of heads take the same turn",
        "csrc/cuda/rotary.cuh",
        "head = group; head < num_heads; head += num_groups",
        "head = group; head < num_heads; head += num_groups + 1",
        "tests/test_cuda.py -k on_the_host",
    ),
    Fault(
        "traffic of rope_2d: pairs past the last of a head are loaded",
        "kernels/_rotary.py",
        "b = tl.load(x_ptrs + NUM_PAIRS + offs_i, mask=mask,",
        "b = tl.load(x_ptrs + NUM_PAIRS + offs_i, mask=mask_th,",
        traffic("rope_2d", "Qwen2"),
    ),
    Fault(
        "traffic of rope_2d: some channels of a head are loaded twice",
        "kernels/_rotary.py",
        "a = tl.load(x_ptrs + offs_i, mask=mask,",
        "a = tl.load(x_ptrs + offs_i, mask=mask_th,",
        "tests/test_traffic.py -k request-and-rope_2d-and-float32",
    ),
    Fault(
        "traffic of rope: the last tile begins early and does rows of another again",
        "kernels/rope.py",
        "offs_t = first_t + tl.arange(0, BLOCK_T)",
        "offs_t = tl.minimum(first_t, tl.maximum(num_tokens - BLOCK_T, 0)) + tl.arange(0, BLOCK_T)",
        traffic("rope", "ragged"),
    ),
    Fault(
        "traffic of merge_tokens: weights are loaded past the last",
        "kernels/merge_tokens.py",
        "mask=mask_affine & mask_c",
        "mask=mask_c",
        traffic("merge_tokens", "registers"),
    ),
    Fault(
        "traffic of patchify: patches past the last of a frame are loaded",
        "kernels/patchify.py",
        "source * stride_f, mask=mask,",
        "source * stride_f, mask=mask_k[None, :],",
        traffic("patchify", "SigLIP"),
    ),
    Fault(
        "traffic of patchify: a frame that is repeated is read again",
        "kernels/patchify.py",
        "if source < frames:",
        "source = tl.minimum(source, frames - 1)\n        if True:",
        "tests/test_traffic.py -k elementwise-and-twice",
    ),
    Fault(
        "traffic of varlen_attention: a row of scratch is not written where it is not read",
        "kernels/varlen_attention.py",
        "tl.store(delta_ptr + offs_row, delta, mask=mask_row)",
        "tl.store(delta_ptr + offs_row, delta, mask=sees)",
        traffic("varlen_attention", "fewer"),
    ),
    Fault(
        "traffic of varlen_attention: every chunk writes what its queries share",
        "kernels/varlen_attention.py",
        "mask_row = mask_q & (chunk == 0)",
        "mask_row = mask_q",
        traffic("varlen_attention", "few", "bfloat16"),
    ),
    Fault(
        "traffic of varlen_attention: twice as many idle programs as needed",
        "kernels/varlen_attention.py",
        'tiles["BLOCK_Q"] + num_segments + 1\n    segments',
        'tiles["BLOCK_Q"] + 2 * num_segments + 2\n    segments',
        "tests/test_traffic.py -k idle_programs-and-Qwen2",
    ),
    Fault(
        "traffic: a view is all of its buffer",
        "python/patchpack/testing/traffic.py",
        "near & (own == _in_each_byte(1, size))",
        "near",
        "tests/test_traffic.py -k between_the_rows",
    ),
    Fault(
        "traffic: programs may read what others write",
        "python/patchpack/testing/traffic.py",
        "_READ: _WRITTEN | _ATOMIC",
        "_READ: _ATOMIC",
        "tests/test_traffic.py -k what_another_writes",
    ),
    Fault(
        "bench: a provider's gradients are another's too",
        "bench/_harness.py",
        "own = [x.clone() for x in cotangents]",
        "own = cotangents",
        "tests/test_gpu_rehearsal.py -k spoils_nothing",
    ),
    Fault(
        "bench: inputs that a peer has changed are not put back",
        "bench/_harness.py",
        "            x.copy_(before)\n",
        "",
        "tests/test_gpu_rehearsal.py -k spoils_nothing",
    ),
    Fault(
        "bench: an op that fails does not fail the run",
        "bench/run.py",
        'if s.get("failed") and',
        "if False and",
        "tests/test_gpu_rehearsal.py -k triton_cannot_compile",
    ),
    Fault(
        "bench: a case beyond the memory of a GPU ends the op",
        "bench/_harness.py",
        "except torch.OutOfMemoryError as error:\n        reason",
        "except ZeroDivisionError as error:\n        reason",
        "tests/test_gpu_rehearsal.py -k triton_cannot_compile",
    ),
    Fault(
        "verify: a GPU that answers no more is asked on",
        "python/patchpack/cli/verify.py",
        "if not machine.answers(device):\n                    stopped",
        "if False:\n                    stopped",
        "tests/test_gpu_rehearsal.py -k answers_no_more",
    ),
    Fault(
        "interpreter: bf16 repair left out",
        "python/patchpack/_interpreter_arithmetic.py",
        "    if _stock_is_right():\n        yield",
        "    if True:\n        yield",
        "tests/test_interpreter.py",
    ),
]


def words(tests: str) -> list[str]:
    file, _, keyword = tests.partition(" -k ")
    return [file, *(["-k", keyword.replace("-and-", " and ")] if keyword else [])]


def copy_tree(folder: Path) -> None:
    for name in FOLDERS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore, symlinks=True)
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder)
    link = folder / "python/patchpack/kernels"
    if not link.exists():
        link.symlink_to("../../kernels")


def build(folder: Path) -> None:
    """The C++ of a copy, quickly."""
    env = {**os.environ, "PATCHPACK_NATIVE": "1", "CXXFLAGS": "-O1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the C++ does not compile:\n{done.stdout}\n{done.stderr}")


def run(folder: Path, tests: str) -> tuple[bool, str]:
    """Whether pytest passes there, and its last line."""
    env = {**os.environ, "PYTHONPATH": str(folder / "python"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [Path(sys.executable).parent / "pytest", "-x", "-q", "--no-header", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *words(tests)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    if done.returncode < 0:
        return False, f"killed by signal {-done.returncode}"
    lines = done.stdout.strip().splitlines()
    if done.returncode > 1:
        raise RuntimeError(f"pytest stopped with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.returncode == 0, lines[-1]


def try_fault(fault: Fault) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tree(folder)
        file = folder / fault.file
        source = file.read_text()
        if source.count(fault.old) < 1:
            raise RuntimeError(f"{fault.what}: {fault.old!r} is not in {fault.file}")
        file.write_text(source.replace(fault.old, fault.new))
        if fault.file.startswith("csrc/") and not fault.file.startswith("csrc/cuda/"):
            build(folder)  # of CUDA, the tests build what they run
        passed, line = run(folder, fault.tests)
    return "SURVIVED" if passed else "seen", line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="faults whose description contains this")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if options.only in fault.what]

    with tempfile.TemporaryDirectory() as name:
        copy_tree(Path(name))
        for tests in sorted({fault.tests for fault in faults}):
            passed, line = run(Path(name), tests)
            print(f"{'without a fault':60} {'green' if passed else 'RED':9} {line}", flush=True)
            if not passed:
                return 1

    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for fault, (verdict, line) in zip(faults, pool.map(try_fault, faults), strict=True):
            survivors += verdict != "seen"
            print(f"{fault.what:60} {verdict:9} {line}", flush=True)
    print(f"{len(faults)} faults, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
