"""Faults of ``scatter_tokens``."""

from faults import Fault, contract

FAULTS = [
    Fault(
        "scatter_tokens: replaced rows pass their gradient on",
        "kernels/scatter_tokens.py",
        "source == token + num_vectors, source < 0)",
        "source == token + num_vectors, source < num_vectors)",
        contract("scatter_tokens"),
    ),
    Fault(
        "scatter_tokens: a token that lost its row gets a gradient",
        "kernels/scatter_tokens.py",
        "source == token + num_vectors, source < 0)",
        "source >= num_vectors, source < 0)",
        "tests/test_scatter_tokens.py -k touch_nothing_else",
    ),
    Fault(
        "scatter_tokens: a token without a row takes the first",
        "kernels/scatter_tokens.py",
        "mask = mask & (rows >= 0) & (rows < num_rows)",
        "rows = tl.maximum(rows, 0)\n    mask = mask & (rows < num_rows)",
        "tests/test_scatter_tokens.py -k touch_nothing_else",
    ),
    Fault(
        "scatter_tokens: a batch is read as if without gaps",
        "kernels/_tiles.py",
        "batch.to(tl.int64) * stride_batch",
        "batch.to(tl.int64) * num_rows * stride_row",
        "tests/test_scatter_tokens.py -k batch_of_views",
    ),
    Fault(
        "scatter_tokens: offsets of gradients in 32 bits",
        "kernels/_tiles.py",
        "return ptr + offsets * STRIDE_UNIT",
        "return ptr + (offsets * STRIDE_UNIT).to(tl.int32)",
        contract("scatter_tokens", "int64"),
    ),
    Fault(
        "native scatter_tokens: bytes copied past the caches start too late",
        "csrc/vec.h",
        "std::memcpy(to, from, i);",
        "std::memcpy(to, from, i++);",
        "tests/test_scatter_tokens.py -k more_than_caches_hold",
    ),
    Fault(
        "native scatter_tokens: an index beyond the sequence is followed",
        "csrc/scatter_tokens.cpp",
        "if (rows[i] >= 0 && rows[i] < num_rows)",
        "if (rows[i] >= 0)",
        "tests/test_scatter_tokens.py -k touch_nothing_else",
    ),
]
