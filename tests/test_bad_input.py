"""Bad input, as data: ``bad_input.txt`` says what is refused, and in which words.

A line with no indent is a call that is right. Every line under it changes arguments of that call,
and says which error comes of it and how its message begins. What names an argument, names the first
one that the line changes.
"""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import patchpack
from patchpack import PackedGrid, TokenLayout, metadata, packing
from patchpack.layout import FeatureMap, Vector, validate_index
from patchpack.models import NativeViT, NativeViTConfig
from patchpack.systems import (
    internvl,
    llava_onevision,
    moonvit,
    oryx,
    pixtral,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    siglip2,
)

SYSTEMS = (
    internvl,
    llava_onevision,
    moonvit,
    oryx,
    pixtral,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    siglip2,
)
IMPLS = ("reference", "triton", "native")


def _values() -> dict:
    """What the table's arguments are made of: 20 tokens in two images, heads, pixels, text."""
    grid = PackedGrid([(4, 4), (2, 2)])
    merged = PackedGrid([(4, 4), (4, 4)], 2)
    small = NativeViTConfig(
        patch_size=2, temporal_patch_size=1, hidden_size=16, depth=1, num_heads=2, out_size=8
    )
    heads = torch.arange(20 * 3 * 2 * 32).view(20, 3, 2, 32) / 4000
    image = torch.arange(3 * 8 * 12).view(3, 8, 12).to(torch.uint8)
    return {
        **vars(patchpack),
        **vars(metadata),
        **vars(packing),
        **{module.__name__.rpartition(".")[2]: module for module in SYSTEMS},
        "FeatureMap": FeatureMap,
        "Vector": Vector,
        "validate_index": validate_index,
        "NativeViT": NativeViT,
        "NativeViTConfig": NativeViTConfig,
        "torch": torch,
        "np": np,
        "GRID": grid,
        "MERGED": merged,
        "QKV": heads,
        **{name: heads[:, i].clone() for i, name in enumerate("QKV")},
        "COS": torch.ones(20, 16),
        "SIN": torch.zeros(20, 16),
        "IDS": torch.ones(3, 20, dtype=torch.int64),
        "CU": torch.tensor([0, 16, 20], dtype=torch.int32),
        "X": torch.arange(160).view(20, 8) / 100,
        "QUERY": torch.arange(40).view(5, 8) / 100,
        "TABLE": torch.ones(3, 3, 8),
        "ORYX_TABLE": torch.ones(128, 128, 8),
        "WEIGHT": torch.ones(32),
        "INDEX": torch.tensor([3, 1, 4, 0, 6]),
        "WHICH": torch.full((20,), -1),
        "LAYOUT": TokenLayout([FeatureMap(0, (4, 4), newline=0), Vector(1)]),
        "IMAGES": [image, image[:, :4, :8].clone()],
        "PATCHES": PackedGrid([(2, 3), (1, 2)]),
        "THW": torch.tensor([[1, 4, 4], [2, 2, 2]]),
        "TEXT": torch.full((20,), 9),
        "VISION": torch.tensor([9, 1, 2, 2, 2, 2, 9]),
        "NESTED": torch.nested.nested_tensor([torch.zeros(2, 3, 4)], layout=torch.jagged),
        "SMALL": small,
        "ENCODER": NativeViT(small),
        "PIXELS": torch.arange(32 * 12).view(32, 12) / 400,
        "PHOTO": np.zeros((16, 24, 3), np.uint8),
        "PLAN": qwen2_vl.plan(56, 56),
        "QWEN3": qwen3_vl.plan(64, 64),
        "PIXTRAL": pixtral.plan(32, 32),
        "ORYX": oryx.plan(64, 64),
        "ONEVISION": llava_onevision.plan(384, 384),
    }


def _calls() -> list[tuple[str, list[tuple[str, str]]]]:
    """Every call that is right, with what changes of it and the error that must come of that."""
    calls = []
    for line in filter(str.strip, TEXT.splitlines()):
        if line.startswith(" "):
            change, _, error = line.strip().partition(" -> ")
            calls[-1][1].append((change, error))
        else:
            calls.append((line, []))
    return calls


TEXT = Path(__file__).with_name("bad_input.txt").read_text()
CALLS = _calls()


def _parts(call: str, values: dict):
    """What is called, and the text of its arguments."""
    name, _, arguments = call.partition("(")
    return eval(name, values), arguments.removesuffix(")")


def _arguments(text: str, values: dict) -> dict:
    return eval(f"dict({text})", values)


def _tensors(values: dict) -> dict[str, torch.Tensor]:
    """The tensors that calls are given, those of images and of objects too."""
    found = {}
    for name, x in values.items():
        if isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_nested:
            found[name] = x
        elif isinstance(x, (PackedGrid, TokenLayout)):
            found |= {f"{name}.{n}": y for n, y in vars(x).items() if isinstance(y, torch.Tensor)}
        elif name == "IMAGES":
            found |= {f"{name}[{i}]": y for i, y in enumerate(x)}
    return found


@pytest.mark.parametrize(("call", "changes"), CALLS, ids=[call for call, _ in CALLS])
def test_what_is_refused_is_named_and_nothing_is_written(call, changes):
    values = _values()
    function, right = _parts(call, values)
    before = {name: x.clone() for name, x in _tensors(values).items()}
    has_impl = "impl" in inspect.signature(function).parameters
    wrong = []
    for change, error in changes:
        impls = IMPLS if has_impl and "impl=" not in change else (None,)
        for impl in impls:
            arguments = _arguments(right, values) | _arguments(change, values)
            if impl is not None:
                if reason := patchpack.available("rope", impl):
                    pytest.skip(reason)
                arguments["impl"] = impl
            try:
                function(**arguments)
                came = "nothing"
            except Exception as raised:  # whatever it is, it is compared
                came = f"{type(raised).__name__}: {raised}"
            if not came.startswith(error):
                wrong.append(f"{change}, impl={impl}: {came}")
    assert not wrong, "\n".join(wrong)
    for name, x in _tensors(values).items():
        if not x.is_meta and not name.startswith("GRID._position"):
            assert torch.equal(x, before[name]), f"{name} was written"


@pytest.mark.parametrize(("call", "changes"), CALLS, ids=[call for call, _ in CALLS])
def test_a_call_is_right_without_its_changes(call, changes):
    values = _values()
    function, right = _parts(call, values)
    function(**_arguments(right, values))
    assert changes


def test_errors_say_which_argument():
    """By its name, or that of the grid whose method is called."""
    for call, changes in CALLS:
        for change, error in changes:
            kind, _, message = error.partition(": ")
            argument = change.partition("=")[0]
            names = (argument, "grid") if call.startswith("GRID.") else (argument,)
            assert kind in ("ValueError", "TypeError"), (call, change)
            assert any(re.search(rf"\b{name}s?\b", message) for name in names), (call, change)


# what no case can be about, and why
WITHOUT_CASES = {
    "moonvit.frame_embeddings(device)": "it goes to torch as it is",
    "qwen2_5_vl.plan_video(options)": "those of qwen2_vl.plan_video",
}
# an attribute that may change at any time: the op that runs says what is wrong
MODULES = "Projector", "DynamicCompressor", "SimpleMlp", "TokenPath", "Embeddings", "PoolingHead"
MODULES = (*MODULES, "NativeViT")


def _public() -> dict[str, object]:
    """What is public and checks its arguments, by the names that the table has."""
    found = {name: getattr(patchpack, name) for name in patchpack.__all__}
    found |= {name: x for name, x in vars(metadata).items() if inspect.isfunction(x)}
    found |= {name: getattr(packing, name) for name in packing.__all__}
    found |= {"validate_index": validate_index, "NativeViTConfig": NativeViTConfig}
    found |= {"NativeViT": NativeViT, "TokenLayout.cat": TokenLayout.cat}
    for module in SYSTEMS:
        name = module.__name__.rpartition(".")[2]
        found |= {
            f"{name}.{n}": x
            for n, x in vars(module).items()
            if getattr(x, "__module__", "") == module.__name__ and n != "Plan"
        }
    return {
        name: x
        for name, x in found.items()
        if callable(x) and not name.rpartition(".")[2].startswith("_")
    }


def test_every_argument_of_every_public_function_has_a_case():
    values, covered = _values(), {}
    for call, changes in CALLS:
        name = call.partition("(")[0]
        for change, _ in changes:
            covered.setdefault(name, set()).update(_arguments(change, values))
    results = ("Balance", "Packing", "is_integer")  # made by patchpack itself; and one asks
    missing = []
    for name, function in _public().items():
        if name in results:
            continue
        for argument in inspect.signature(function).parameters:
            attribute = argument == "impl" and name.rpartition(".")[2] in MODULES
            known = f"{name}({argument})" in WITHOUT_CASES or attribute
            if not known and argument not in covered.get(name, ()):
                missing.append(f"{name}({argument})")
    assert not missing
    assert sum(len(changes) for _, changes in CALLS) > 1000
