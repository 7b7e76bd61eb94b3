"""Faults of what native ops share."""

from faults import Fault, native

FAULTS = [
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
        "native sums: only the last few rows count",
        "csrc/sums_kernels.h",
        "all[c] += few[c]",
        "all[c] = few[c]",
        "tests/test_assemble.py -k long_sequence",
    ),
]
