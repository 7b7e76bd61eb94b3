"""Faults of the systems."""

from faults import Fault

FAULTS = [
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
]
