"""Faults of the image processor of transformers."""

from faults import Fault

FILE = "python/patchpack/integrations/transformers/_image_processor.py"
TESTS = "tests/test_image_processor.py"

FAULTS = [
    Fault(
        "image processor: floats are rounded to bytes, not cut",
        FILE,
        "(wide * 255).float().to(torch.uint8)",
        "(wide * 255).round().to(torch.uint8)",
        f"{TESTS} -k floats_are_resized",
    ),
    Fault(
        "image processor: the unit of the first image is that of all",
        FILE,
        "(image.pixels.dtype, image.unit)",
        "image.pixels.dtype",
        f"{TESTS} -k rounding-and-mixed",
    ),
    Fault(
        "image processor: a size of a call is forgotten",
        FILE,
        '("size" in given or chosen[name] is None)',
        "chosen[name] is None",
        f"{TESTS} -k limits_of_a_call",
    ),
    Fault(
        "image processor: limits of a call lose to those of the processor",
        FILE,
        "if name not in given and",
        "if",
        f"{TESTS} -k limits_of_a_call",
    ),
    Fault(
        "image processor: limits are written into a caller's size",
        FILE,
        'copy.copy(options.pop("size", None) or self.size)',
        'options.pop("size", None) or self.size',
        f"{TESTS} -k limits_are_those",
    ),
    Fault(
        "image processor: always bicubic",
        FILE,
        "mode=options.resample, **recipe",
        'mode="bicubic", **recipe',
        f"{TESTS} -k bilinear",
    ),
    Fault(
        "image processor: scaled though it is told not to",
        FILE,
        "(options.rescale_factor if options.do_rescale else 1)",
        "options.rescale_factor",
        f"{TESTS} -k differ_from_the_original_by_rounding",
    ),
    Fault(
        "image processor: transparency of colours is not seen",
        FILE,
        'image.mode != "RGB" or "transparency" in image.info',
        'image.mode != "RGB"',
        f"{TESTS} -k kinds_of_images",
    ),
    Fault(
        "image processor: alpha upside down",
        FILE,
        "(alpha * image[:3] + (1 - alpha) * 255)",
        "((1 - alpha) * image[:3] + alpha * 255)",
        f"{TESTS} -k kinds_of_images",
    ),
    Fault(
        "image processor: where channels are is not asked",
        FILE,
        "(layout or infer_channel_dimension_format(image, (1, 3, 4)))",
        "infer_channel_dimension_format(image, (1, 3, 4))",
        f"{TESTS} -k images_of_any_size",
    ),
    Fault(
        "image processor: dtype is not saved",
        FILE,
        '"image_processor_type": NAME, "dtype": dtype}',
        '"image_processor_type": NAME, "dtype": "float32"}',
        f"{TESTS} -k settings_are",
    ),
    Fault(
        "image processor: saved under its own name",
        FILE,
        '"image_processor_type": NAME, "dtype"',
        '"image_processor_type": type(self).__name__, "dtype"',
        f"{TESTS} -k settings_are_saved",
    ),
    Fault(
        "image processor: the merge size of a call is not that of the grid",
        FILE,
        "PackedGrid(sizes, options.merge_size,",
        "PackedGrid(sizes, 2,",
        f"{TESTS} -k options_are_the_originals",
    ),
]
