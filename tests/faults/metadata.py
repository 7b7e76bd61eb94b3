"""Faults of metadata of a batch."""

from faults import Fault

FAULTS = [
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
        "native metadata: rows and columns of positions exchanged",
        "csrc/metadata.cpp",
        "put(token, base + t, base + row, base + col)",
        "put(token, base + t, base + col, base + row)",
        "tests/test_metadata.py -k positions_are_those_of_the_loop",
    ),
]
