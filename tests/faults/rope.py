"""Faults of ``rope``, and of what rotary ops share."""

from faults import Fault, contract, native, traffic

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
        "traffic of rope: the last tile begins early and does rows of another again",
        "kernels/rope.py",
        "offs_t = first_t + tl.arange(0, BLOCK_T)",
        "offs_t = tl.minimum(first_t, tl.maximum(num_tokens - BLOCK_T, 0)) + tl.arange(0, BLOCK_T)",
        traffic("rope", "ragged"),
    ),
]
