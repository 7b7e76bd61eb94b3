"""Faults of packing images and batches."""

from faults import Fault, contract

FAULTS = [
    Fault(
        "merge-block order: position in the block transposed",
        "kernels/_tiles.py",
        "MERGE + in_block // MERGE",
        "MERGE + in_block % MERGE",
        contract("rope_2d"),
    ),
    Fault(
        "packing: merging what does not divide",
        "python/patchpack/packing/_grid.py",
        "(sizes[:, 1:] % merge_size).any(axis=1)",
        "(sizes[:, 1:] % merge_size).all(axis=1)",
        "tests/test_packing.py -k not_merged",
    ),
    Fault(
        "packing: segments of a clip merged where frames are meant",
        "python/patchpack/packing/_grid.py",
        "    if merge_temporal:\n",
        "    if not merge_temporal:\n",
        "tests/test_packing.py",
    ),
    Fault(
        "packing: a resized clip falls apart into frames",
        "python/patchpack/packing/_grid.py",
        "_build(sizes, None, spatial_merge_size, self.merge_temporal, device)",
        "_build(sizes, None, spatial_merge_size, False, device)",
        "tests/test_packing.py",
    ),
    Fault(
        "pack: the shortest sample goes first",
        "python/patchpack/packing/_pack.py",
        "key=tokens.__getitem__, reverse=True",
        "key=tokens.__getitem__",
        "tests/test_pack.py -k best_fit",
    ),
    Fault(
        "pack: a sample goes where it leaves the most room",
        "python/patchpack/packing/_pack.py",
        "at = bisect_left(rooms, tokens[i])",
        "at = max(bisect_left(rooms, tokens[i]), len(rooms) - 1)",
        "tests/test_pack.py -k best_fit",
    ),
    Fault(
        "pack: sequences in the order in which they were opened",
        "python/patchpack/packing/_pack.py",
        "tuple(sorted(tuple(sorted(samples)) for samples in bins))",
        "tuple(tuple(sorted(samples)) for samples in bins)",
        "tests/test_pack.py -k keep_the_order",
    ),
]
