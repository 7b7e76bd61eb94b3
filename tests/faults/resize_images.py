"""Faults of ``resize_images``."""

from faults import Fault, contract

FAULTS = [
    Fault(
        "resize_images: sums cut off instead of rounded",
        "kernels/resize_images.py",
        "HALF: tl.constexpr = 1 << (BITS - 1)",
        "HALF: tl.constexpr = 0",
        contract("resize_images"),
    ),
    Fault(
        "resize_images: sums past white wrap around",
        "kernels/resize_images.py",
        "tl.minimum(tl.maximum(total >> BITS, 0), 255)",
        "(total >> BITS)",
        contract("resize_images"),
    ),
    Fault(
        "resize_images: offsets of channels in 32 bits",
        "kernels/resize_images.py",
        "(plane % num_channels) * tl.load(entry_ptr + 7)",
        "(plane % num_channels) * tl.load(entry_ptr + 7).to(tl.int32)",
        contract("resize_images", "int64"),
    ),
    Fault(
        "resize_images: the width always goes first",
        "python/patchpack/_resampling.py",
        "return fewer_rows > max(2 * fewer_columns, 0)",
        "return False",
        "tests/test_resize_images.py -k height_goes_first",
    ),
    Fault(
        "resize_images: weights not rounded",
        "python/patchpack/_resampling.py",
        "np.trunc(fixed + np.copysign(0.5, fixed))",
        "np.trunc(fixed)",
        "tests/test_resize_images.py -k bytes_are",
    ),
    Fault(
        "native resize_images: of many taps, cut off instead of rounded",
        "csrc/resize_kernels.h",
        "(total + kHalf) >> kWeightBits",
        "total >> kWeightBits",
        "tests/test_resize_images.py -k bytes_of_pillow",
    ),
    Fault(
        "native resize_images: of few taps, cut off instead of rounded",
        "csrc/resize_kernels.h",
        "Ints{} + (kHalf >> ((kParts - 1) * kPartBits))",
        "Ints{}",
        "tests/test_resize_images.py -k bytes_of_pillow",
    ),
    Fault(
        "native resize_patchify: every strip is the first",
        "csrc/resize_patchify.h",
        "top = strip.row * height",
        "top = 0",
        "tests/test_patchify.py -k native_resampling",
    ),
    Fault(
        "native resize_patchify: a strip is overwritten while it is cut",
        "csrc/resize_patchify.h",
        "half = patch.temporal - half;",
        "",
        "tests/test_patchify.py -k native_resampling",
    ),
    Fault(
        "native resize_patchify: the last strip is not cut",
        "csrc/resize_patchify.h",
        "  cutter.finish();\n  fence();",
        "  fence();",
        "tests/test_patchify.py -k native_resampling",
    ),
]
