"""Faults of videos."""

from faults import Fault

FAULTS = [
    Fault(
        "video: frames that need what was jumped over are kept",
        "python/patchpack/video.py",
        "if f.pts is not None and f.pts >= time",
        "if f.pts is not None",
        "tests/test_video.py -k decoding_everything",
    ),
    Fault(
        "video: frames that are not shown are counted",
        "python/patchpack/video.py",
        "if p.size and not p.is_discard",
        "if p.size",
        "tests/test_video.py -k probe_counts",
    ),
    Fault(
        "video: a decoder that gives other frames goes unnoticed",
        "python/patchpack/video.py",
        "if frame is None or frame.pts != shown",
        "if frame is None or not shown",
        "tests/test_video.py -k disagrees",
    ),
    Fault(
        "video: a clip that was cut is trusted",
        "python/patchpack/video.py",
        'if shown["seek"][0] == _UNKNOWN or',
        "if False and",
        "tests/test_video.py -k from_an_open_group or without_its_keyframe or edit_list",
    ),
    Fault(
        "video: turned the other way",
        "python/patchpack/video.py",
        "90: PIL.Image.Transpose.ROTATE_90,",
        "90: PIL.Image.Transpose.ROTATE_270,",
        "tests/test_video.py -k turned",
    ),
    Fault(
        "video: all frames are read at once",
        "python/patchpack/video.py",
        "zip(frames, wanted.values(), strict=True)",
        "zip(list(frames), wanted.values(), strict=True)",
        "tests/test_video.py -k long_clip",
    ),
]
