"""Faults of ``merge_tokens``."""

from faults import Fault, contract, native, traffic

FAULTS = [
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
        "native merge_tokens: the norm's gradient without what goes along z",
        "csrc/merge_tokens.h",
        "(w - mean_w - z * mean_wz) * rstd",
        "(w - mean_w) * rstd",
        native("merge_tokens"),
    ),
    Fault(
        "traffic of merge_tokens: weights are loaded past the last",
        "kernels/merge_tokens.py",
        "mask=mask_affine & mask_c",
        "mask=mask_c",
        traffic("merge_tokens", "registers"),
    ),
]
