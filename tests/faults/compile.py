"""Faults of padded grids, and of what torch compiles, exports and transforms."""

from faults import Fault

GRID = "python/patchpack/packing/_grid.py"
ENCODER = "python/patchpack/models/native_vit.py"
COMPILE = "tests/test_compile.py -k "
PADDED = "tests/test_padded_grid.py -k "
TRANSFORMS = "tests/test_transforms.py -k "

FAULTS = [
    Fault(
        "padded grid: padding is in the last segment",
        GRID,
        "(0, num_segments - self.num_segments), value=self.num_tokens",
        "(0, num_segments - self.num_segments), value=num_tokens",
        PADDED + "is_in_no_segment",
    ),
    Fault(
        "padded grid: its segments stay those of the first batch",
        GRID,
        '("grid_thw", "geometry", "cu_seqlens", "_sizes", "_bounds"):',
        '("grid_thw", "geometry", "_sizes"):',
        PADDED + "becomes_another_batch",
    ),
    Fault(
        "padded grid: rows and columns stay those of the first batch",
        GRID,
        "self._position_ids.copy_(self._make_position_ids())",
        "self._make_position_ids()",
        PADDED + "becomes_another_batch",
    ),
    Fault(
        "padded grid: merged segments are too long",
        GRID,
        "self.cu_seqlens // m**2",
        "self.cu_seqlens // m",
        PADDED + "becomes_another_batch",
    ),
    Fault(
        "padded grid: it fits without a block for each image that is missing",
        GRID,
        "self.num_tokens + (missing + 1) * b * b",
        "self.num_tokens + b * b",
        PADDED + "not_padded",
    ),
    Fault(
        "grid: compiled anew once its rows and columns are kept",
        GRID,
        "if torch.compiler.is_compiling():  # whether they are built",
        "if False:  # whether they are built",
        COMPILE + "comes_again",
    ),
    Fault(
        "pytrees: numbers of a grid are new tensors each time",
        "python/patchpack/packing/_pytree.py",
        '{"_lengths": lengths, **rest(x)}',
        '{"_lengths": None, **rest(x)}',
        COMPILE + "exported_op-and-rope_2d",
    ),
    Fault(
        "encoder: padding has a place past the last segment",
        ENCODER,
        "(segment + 1).clamp(max=grid.num_segments)",
        "(segment + 1)",
        PADDED + "no_bit_of_an_encoder-and-internvl",
    ),
    Fault(
        "encoder: padding is in windows",
        ENCODER,
        "torch.minimum(bounds, grid.cu_seqlens[-1])",
        "bounds",
        PADDED + "room_for_all_windows",
    ),
    Fault(
        "encoder: no room for the windows that frames end with",
        ENCODER,
        "num_windows = grid.num_segments + num_blocks //",
        "num_windows = 1 + num_blocks //",
        PADDED + "room_for_all_windows",
    ),
    Fault(
        "encoder: class tokens are wide under autocast",
        ENCODER,
        "self.class_token.to(x.dtype).expand",
        "self.class_token.expand",
        TRANSFORMS + "under_autocast-and-internvl",
    ),
    Fault(
        "transforms of torch.func reach the kernels",
        "python/patchpack/_dispatch.py",
        'if impl != "reference" and torch._C._are_functorch_transforms_active():',
        "if False:",
        TRANSFORMS + "right_or_refused-and-rope_2d-and-native",
    ),
    Fault(
        "assemble: as many tokens as in the first batch",
        "python/patchpack/ops/assemble.py",
        "math.prod(tokens.shape[:-1]) < layout",
        "tokens.shape[:-1].numel() < layout",
        COMPILE + "exported_op-and-assemble",
    ),
]
