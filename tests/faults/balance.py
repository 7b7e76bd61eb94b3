"""Faults of balancing batches."""

from faults import Fault

FAULTS = [
    Fault(
        "balance: images are taken as they come",
        "python/patchpack/packing/_balance.py",
        "sorted(range(len(costs)), key=costs.__getitem__, reverse=True)",
        "range(len(costs))",
        "tests/test_balance.py -k busier",
    ),
    Fault(
        "balance: frames attend to each other",
        "python/patchpack/packing/_balance.py",
        "squares += frames * (rows * cols) ** 2",
        "squares += (frames * rows * cols) ** 2",
        "tests/test_balance.py -k by_hand",
    ),
]
