"""Faults of ``patchify``."""

from faults import Fault, contract, native, traffic

FAULTS = [
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
        "native patchify: a last frame that stands alone is not repeated",
        "csrc/patchify_kernels.h",
        "? 1 : patch_.temporal - frame",
        "? 1 : 1",
        native("patchify", "fully_written"),
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
]
