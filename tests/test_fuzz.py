"""Every public op on drawn batches: ragged lengths, strange strides, every option and instruction.

``make fuzz`` runs this file: it draws for ``FUZZ_SECONDS``, op after op, prints every failure with
what repeats it, and keeps failures in ``.hypothesis``, where the next run begins. As a test it
makes a few draws that are always the same.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
from fuzzing.host import check_metadata, check_sequence, drawn_grids, drawn_sequence
from fuzzing.ops import (
    LAYOUTS,
    Drawn,
    cancels,
    check_drawn,
    check_in_place,
    check_layouts,
    drawn_buffer,
    drawn_case,
)
from fuzzing.options import OPTIONS, Parts
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

import patchpack
from patchpack.testing.catalogue import SPECS
from patchpack.testing.compare import Accuracy

DATABASE = Path(__file__).parents[1] / ".hypothesis/fuzz"
SETTINGS = hypothesis.settings(
    deadline=None, print_blob=True, suppress_health_check=list(HealthCheck)
)

FUZZED: dict[str, tuple[st.SearchStrategy, Callable]] = {
    "grids": (drawn_grids(), check_metadata),
    "M-RoPE ids": (drawn_sequence(), check_sequence),
}
for impl in ("native", "triton"):
    for op in OPTIONS:
        FUZZED[f"{op}, {impl}"] = drawn_case(op, impl), check_drawn
    for op in ("rope_2d", "mrope"):
        FUZZED[f"{op}_, {impl}"] = drawn_buffer(op, impl), check_in_place


def fuzz(name: str, settings: hypothesis.settings, seed: int, blob: str | None = None) -> None:
    """Make draws of ``FUZZED[name]``; raises what the smallest that fails raises."""
    strategy, check = FUZZED[name]

    def run(drawn):
        check(drawn)

    if blob:
        run = hypothesis.reproduce_failure(hypothesis.__version__, blob.encode())(run)
    settings(hypothesis.seed(seed)(hypothesis.given(strategy)(run)))()


def test_every_op_is_fuzzed():
    assert OPTIONS.keys() == SPECS.keys()
    in_place = {name for name in patchpack.__all__ if name.endswith("_")}
    assert in_place == {name.partition(",")[0] for name in FUZZED if "_, " in name}


@pytest.mark.parametrize("name", FUZZED)
def test_a_few_draws(name):
    if "native" in name and (reason := patchpack.available("rope", "native")):
        pytest.skip(reason)
    draws = 2 if "triton" in name else 6 if "native" in name else 25
    settings = hypothesis.settings(
        SETTINGS, max_examples=draws, database=None, phases=[Phase.generate]
    )
    fuzz(name, settings, seed=1)  # as drawn: `make fuzz` looks for the smallest that fails


# what earlier runs found, made as small as it goes
FOUND = {
    "a single key": Drawn(
        op="varlen_attention",
        case="drawn",
        dtype=torch.float16,
        impl="triton",
        options={
            "sizes": [(1, 3, 1), (1, 0, 1)],
            "heads": (1, 1),
            "head_dim": 66,
            "keys": 0.4,
            "causal": False,
            "return_lse": False,
            "padding": 0,
            "more_keys": 0,
            "softmax_scale": None,
            "window_size": (-1, -1),
        },
    ),
    "a sum of few numbers": Drawn(
        op="assemble",
        case="drawn",
        impl="native",
        options={
            "sizes": [(1, 1, 1)],
            "parts": Parts(True, False, False, (0, 0, 0, 0), (1, 30), None, ()),
            "vectors": 0,
            "channels": 1,
            "spare": 0,
        },
    ),
    "a norm over one channel": Drawn(
        op="merge_tokens",
        case="drawn",
        impl="native",
        options={
            "sizes": [(1, 2, 2)],
            "merge": 1,
            "merge_size": None,
            "order": "row",
            "norm": "token weight",
            "params": None,
            "channels": 1,
            "eps": 1e-6,
        },
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name):
    drawn = FOUND[name]
    if reason := patchpack.available(drawn.op, drawn.impl):
        pytest.skip(reason)
    check_drawn(drawn)


@pytest.mark.parametrize(
    ("error", "eager_error", "value", "fits"),
    [(1e-6, 0, 0, True), (1e-4, 0, 0, False), (1e-4, 6e-5, 0, True), (1e-6, 0, 1e-3, False)],
)
def test_only_what_cancels_is_measured_beside_the_rest(error, eager_error, value, fits):
    accuracy = Accuracy("grad_q", error, eager_error, 0, error, eager_error, 0, value)
    assert cancels(accuracy, 1.0, torch.float32) == fits


@pytest.mark.parametrize("op", SPECS)
def test_every_layout_has_the_bits_of_contiguous_inputs(op):
    if reason := patchpack.available(op, "native"):
        pytest.skip(reason)
    for layout, case in itertools.product(LAYOUTS, list(SPECS[op].cases)[:2]):
        drawn = Drawn(op, case, impl="native", options=SPECS[op].cases[case], layouts=(layout,))
        check_layouts(drawn)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("FUZZ_SECONDS", 600)))
    parser.add_argument("--only", default="", help="what contains this in its name, one of FUZZED")
    parser.add_argument("--seed", type=int, help="of the first round; by default another every run")
    parser.add_argument("--blob", help="repeat one failure of --only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name in FUZZED if options.only in name]
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    began, draws, failed = time.monotonic(), Counter(), {}

    for name in itertools.cycle(names):
        if time.monotonic() - began >= options.seconds or len(failed) == len(names):
            break
        if name in failed:
            continue
        database = DirectoryBasedExampleDatabase(DATABASE / name)
        settings = hypothesis.settings(SETTINGS, max_examples=10, database=database)
        try:
            fuzz(name, settings, seed, options.blob)
        except Exception as error:  # whatever it is, it is the finding
            failed[name] = seed
            print(f"FAILED {name}, seed {seed}: {type(error).__name__}: {error}")
            print(*getattr(error, "__notes__", []), sep="\n", flush=True)
        draws[name] += 10
        if name == names[-1]:
            seed += 1
            print(f"{sum(draws.values())} draws, {time.monotonic() - began:.0f} s", flush=True)

    for name in names:
        print(f"{name:28} {draws[name]:6} draws {'FAILED' if name in failed else 'ok'}")
    print(f"{time.monotonic() - began:.0f} s, {sum(draws.values())} draws, {len(failed)} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
