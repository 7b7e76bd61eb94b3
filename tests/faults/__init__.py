"""Faults that ``mutate.py`` plants, a file for an op or a part of the package."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """Replace ``old`` by ``new`` in ``file``; ``tests`` are pytest's words for what must fail."""

    what: str
    file: str
    old: str
    new: str
    tests: str


def contract(op: str, check: str = "accuracy", dtype: str = "float32") -> str:
    return f"tests/test_contract.py -k {op}-and-{check}-and-{dtype}"


def native(op: str, check: str = "accuracy") -> str:
    return f"tests/test_contract.py -k test_native[{op}-and-{check}"


def traffic(op: str, case: str, dtype: str = "float32") -> str:
    return f"tests/test_traffic.py -k ops_touch-and-{op}-and-{case}-and-{dtype}"
