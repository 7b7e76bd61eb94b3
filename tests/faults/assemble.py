"""Faults of ``assemble``."""

from faults import Fault, contract, native

FAULTS = [
    Fault(
        "assemble: tiles stand in columns",
        "kernels/assemble.py",
        "tile = y // tile_rows * num_beside + x // tile_cols",
        "tile = y // tile_rows + x // tile_cols * num_beside",
        contract("assemble"),
    ),
    Fault(
        "assemble: search for the part ends one step early",
        "kernels/assemble.py",
        "max(num_parts - 1, 0).bit_length()",
        "max(num_parts - 2, 0).bit_length()",
        contract("assemble"),
    ),
    Fault(
        "assemble: what is cropped gets a gradient",
        "kernels/assemble.py",
        "is_read = is_read & (row >= 0) & (row < height) & (col >= 0) & (col < width)",
        "is_read = is_read & (row >= 0) & (col >= 0)",
        contract("assemble"),
    ),
    Fault(
        "assemble: the adjoint forgets newlines",
        "kernels/assemble.py",
        "length = out_cols + (newline >= 0)",
        "length = out_cols + (newline >= 2**30)",
        contract("assemble"),
    ),
    Fault(
        "assemble: weights of zero are read",
        "kernels/assemble.py",
        "read = (mask_t & ~is_vector & (weight != 0.0))",
        "read = (mask_t & ~is_vector)",
        "tests/test_assemble.py -k keeps_nan_out",
    ),
    Fault(
        "assemble: a copied zero loses its sign",
        "kernels/assemble.py",
        "nothing = tl.zeros((BLOCK_T, BLOCK_C), tl.float32) * -1.0",
        "nothing = tl.zeros((BLOCK_T, BLOCK_C), tl.float32) * 1.0",
        "tests/test_assemble.py -k not_resized",
    ),
    Fault(
        "assemble: joined images all read the first",
        "python/patchpack/layout.py",
        "replace(part, first=part.first + shift)",
        "replace(part, first=part.first + 0 * shift)",
        "tests/test_layout.py",
    ),
    Fault(
        "assemble, scatter_tokens: sums leave out the last pieces",
        "kernels/_sums.py",
        "for first in range(0, num_pieces, BLOCK_P):",
        "for first in range(0, 1, BLOCK_P):",
        "tests/test_assemble.py -k long_sequence",
    ),
    Fault(
        "assemble, scatter_tokens: sums see a piece's neighbour",
        "kernels/_sums.py",
        "mask=offs_r < end, other=-1",
        "mask=offs_r < num_rows, other=-1",
        "tests/test_assemble.py -k long_sequence",
    ),
    Fault(
        "native assemble: every row ends with the first vector",
        "csrc/assemble.h",
        "vectors.at(part.newline)",
        "vectors.at(0)",
        native("assemble"),
    ),
]
