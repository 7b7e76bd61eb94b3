"""Faults of ``rope_2d``."""

from faults import Fault, contract, native, traffic

FAULTS = [
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
        "native rope_2d: merge-block order read as raster",
        "csrc/rope_2d.h",
        "token_to_cell(in_frame, width, merge)",
        "token_to_cell(in_frame, width, 1)",
        native("rope_2d"),
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
]
