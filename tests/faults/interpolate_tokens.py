"""Faults of ``interpolate_tokens``."""

from faults import Fault, contract, native

FAULTS = [
    Fault(
        "resample: coordinates past 32 bits in 32 bits",
        "kernels/_resample.py",
        "axis=0) < 2.0**26",
        "axis=0) < 2.0**46",
        "tests/test_interpolate_tokens.py -k past_32_bits-and-triton",
    ),
    Fault(
        "interpolate_tokens: half-pixel offset dropped",
        "kernels/_resample.py",
        "offset, unit = 2 * num_in, num_in - num_out,",
        "offset, unit = 2 * num_in, num_in - num_in,",
        contract("interpolate_tokens"),
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
]
