"""Every kernel, compiled for GPUs that need not be there: see ``patchpack.testing.compiled``."""

import itertools

import pytest
import torch
from marks import slow

from patchpack.testing import compiled
from patchpack.testing.catalogue import SPECS
from patchpack.testing.contract import LENGTH_SETS, Subject, backward, leaves, tensors

# A target, and every which case is compiled for it; `make compiled` takes all. Registers are scarce
# in attention alone
TARGETS = {"sm_80": 3, "sm_86": 8, "sm_90": 3, "sm_100": 4, "sm_120": 8, "gfx942": 8}
# registers a thread and instructions that a kernel may have, about a quarter and as many more than
# the shapes of real models take
BUDGETS = {
    "_add_bwd_kernel": (200, 3800),
    "_add_kernel": (256, 2800),
    "_add_pieces_kernel": (64, 400),
    "_assemble_bwd_kernel": (152, 1400),
    "_assemble_kernel": (208, 2100),
    "_attend_bwd_dkv_kernel": (256, 7300),
    "_attend_bwd_dq_kernel": (288, 10300),
    "_attend_bwd_kernel": (256, 3400),
    "_attend_fwd_kernel": (256, 10200),
    "_attend_kernel": (216, 4000),
    "_attend_rotated_kernel": (256, 6200),
    "_cut_bwd_kernel": (176, 2600),
    "_cut_kernel": (120, 3000),
    "_invert_kernel": (40, 300),
    "_merge_bwd_kernel": (256, 2500),
    "_merge_kernel": (256, 6600),
    "_resize_axis_kernel": (224, 2700),
    "_resize_bwd_kernel": (160, 2400),
    "_resize_kernel": (256, 2600),
    "_rotate_2d_kernel": (120, 1700),
    "_rotate_kernel": (208, 1500),
    "_rotate_multimodal_kernel": (160, 1400),
    "_scatter_bwd_kernel": (112, 1300),
    "_scatter_kernel": (104, 1100),
    "_sum_chunks_kernel": (128, 900),
    "_sum_kernel": (120, 700),
    "_sum_pieces_kernel": (144, 1200),
}
# matrix instructions of half precision
TENSOR_CORES = {
    "sm_80": "HMMA",
    "sm_86": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA",
    "gfx942": "MFMA",
}


def compile_case(subject, target, **changes):
    """All launches of the forward and the backward pass."""
    inputs = subject.inputs(**changes)
    arguments = leaves(inputs, subject.spec.grads)
    with compiled.session(target) as launches:
        outputs = tensors(subject({**inputs, **arguments}))
        backward(outputs, [torch.zeros_like(x) for x in outputs])
    return launches


def _few_subjects():
    """A few cases each, so that no test takes long."""
    params = []
    for op, (target, step) in itertools.product(SPECS, TARGETS.items()):
        cases = list(SPECS[op].cases)
        if op != "varlen_attention" and step > 1:
            step *= 2
        subjects = [Subject(op, case, torch.bfloat16) for case in cases[step // 3 :: step]]
        subjects += [Subject(op, case, torch.float32) for case in cases[:: 3 * step]]
        for first in range(0, len(subjects), 5):
            few = subjects[first : first + 5]
            marks = () if target == "sm_90" else pytest.mark.slow
            params.append(pytest.param(few, target, id=f"{op}-{target}-{first}", marks=marks))
    return params


@pytest.mark.parametrize(("subjects", "target"), _few_subjects())
def test_no_kernel_spills_registers(subjects, target):
    launches = [launch for subject in subjects for launch in compile_case(subject, target)]
    spilled = [launch for launch in launches if launch.spills or launch.stack]
    assert launches
    assert not spilled, compiled.report(spilled)
    over = [
        x
        for x in launches
        if x.registers > BUDGETS[x.kernel][0] or x.instructions > BUDGETS[x.kernel][1]
    ]
    assert not over, compiled.report(over)


@pytest.mark.parametrize("channels", [1152, 3584])
def test_wide_tokens_of_float32_with_vectors_fit_registers(channels):
    subject = Subject("assemble", "LLaVA-OneVision", torch.float32)
    launches = compile_case(subject, "sm_90", channels=channels)
    assert not any(launch.spills or launch.stack for launch in launches)


SPILLED = {  # with tiles of other targets
    "sm_120": ("scale", torch.bfloat16, {"head_dim": 104}),
    "sm_86": ("window", torch.bfloat16, {"head_dim": 80, "heads": (4, 1)}),
    "gfx942": ("scale", torch.float32, {"head_dim": 128}),
    "gfx950": ("window", torch.bfloat16, {"head_dim": 128}),
}


@pytest.mark.parametrize("target", SPILLED)
def test_tiles_of_attention_are_those_of_the_target(target):
    case, dtype, changes = SPILLED[target]
    launches = compile_case(Subject("varlen_attention", case, dtype), target, **changes)
    assert not any(launch.spills or launch.stack for launch in launches)


@pytest.mark.parametrize(
    ("target", "kind"),
    [("sm_90", "HGMMA"), *slow(pair for pair in TENSOR_CORES.items() if pair[0] != "sm_90")],
)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_attention_uses_the_tensor_cores_of_the_target_and_wide_accesses(target, kind, head_dim):
    subject = Subject("varlen_attention", "Qwen2-VL", torch.bfloat16)
    for launch in compile_case(subject, target, head_dim=head_dim):
        assert list(launch.tensor_core) == [kind]
        assert launch.loop["tensor"] > 0
        products = {"fwd": 2, "dq": 3, "dkv": 4}[launch.kernel.split("_")[-2]]
        tile = launch.constants["BLOCK_Q"] * launch.constants["BLOCK_K"]
        assert launch.code.macs == products * tile * head_dim  # nothing for padding
        assert launch.wide_loads > 0
        if kind != "MFMA":  # whose results lie in rows of 64 bits
            assert launch.stores - launch.wide_stores <= 2  # sums of rows, and 16 channels of 80


@pytest.mark.parametrize("op", SPECS)
def test_a_length_that_changes_does_not_recompile(op):
    subject = Subject(op, next(iter(SPECS[op].cases)), torch.bfloat16)
    keys = [
        {launch.key for launch in compile_case(subject, "sm_90", sizes=sizes)}
        for sizes in (*LENGTH_SETS, [(1, 4, 20), (3, 8, 12)], [(1, 8, 8)] * 16)
    ]
    assert keys[0]
    assert all(key == keys[0] for key in keys)
