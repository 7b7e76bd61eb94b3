"""What is packed together: images into one sequence, samples into sequences, work onto ranks.

``PackedGrid`` is the data model that the ops take, ``pack`` fills sequences of a bounded length,
``balance`` shares images out by what they cost.
"""

from patchpack.packing._balance import Balance, balance, vit_flops
from patchpack.packing._grid import PackedGrid, is_integer, validate_cu_seqlens
from patchpack.packing._pack import Packing, pack

__all__ = [
    "Balance",
    "PackedGrid",
    "Packing",
    "balance",
    "is_integer",
    "pack",
    "validate_cu_seqlens",
    "vit_flops",
]
