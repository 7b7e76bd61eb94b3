"""SigLIP 2's sizes, patches and positions, against outputs of the original code."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchpack.systems.siglip2 import image_size, plan

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["cases"]
CASES = [case for case in GOLDEN if case["function"] == "siglip2.image_size"]
SIZES = st.integers(1, 20_000)


@pytest.mark.parametrize("case", CASES)
def test_the_size_of_an_image_is_the_originals(case):
    inputs, outputs = case["inputs"], case["outputs"]
    options = {"patch_size": inputs["patch"], "max_num_patches": inputs["max_num_patches"]}
    size = inputs["height"], inputs["width"]
    assert list(image_size(*size, **options)) == outputs["hw"]
    p = plan(*size, **options)
    assert list(p.resized) == outputs["hw"]
    assert p.vit_tokens == p.llm_tokens == p.total_tokens == outputs["patches"]


@settings(max_examples=200)
@given(SIZES, SIZES, st.sampled_from([14, 16]), st.integers(1, 4096))
def test_every_size_is_that_of_transformers(height, width, patch_size, budget):
    module = pytest.importorskip("transformers.models.siglip2.image_processing_pil_siglip2")
    want = module.get_image_size_for_max_num_patches(height, width, patch_size, budget)
    p = plan(height, width, patch_size=patch_size, max_num_patches=budget)
    assert p.resized == want
    ((t, rows, cols),) = p.grids
    assert (t, rows * patch_size, cols * patch_size) == (1, *p.resized)
    assert p.vit_tokens == math.prod(p.resized) // patch_size**2 <= budget


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"height": 0}, ValueError, "height must be at least 1, got 0"),
        ({"width": 2.5}, TypeError, "width must be an integer, got 2.5"),
        ({"patch_size": True}, TypeError, "patch_size must be an integer, got True"),
        ({"max_num_patches": 0}, ValueError, "max_num_patches must be at least 1, got 0"),
        (
            {"height": 10**10},
            ValueError,
            "height and width must fit into max_num_patches=256 at a scale of 1e-06,"
            " got 10000000000 x 640",
        ),
    ],
)
def test_plan_names_what_it_refuses(arguments, error, message):
    with pytest.raises(error) as raised:
        plan(**{"height": 480, "width": 640, **arguments})
    assert str(raised.value) == message
