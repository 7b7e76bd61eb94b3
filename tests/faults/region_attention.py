"""Faults of ``region_attention``."""

from faults import Fault, contract

FAULTS = [
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
        "native region_attention: tokens not counted from their mean",
        "csrc/region_attention.h",
        "load(cell.x[k] + i, n) - load(mean + i, n)",
        "load(cell.x[k] + i, n)",
        "tests/test_region_attention.py -k alike_neighbours",
    ),
]
