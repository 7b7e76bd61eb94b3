"""Faults of ``mrope``."""

from faults import Fault, contract, native

FAULTS = [
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
]
