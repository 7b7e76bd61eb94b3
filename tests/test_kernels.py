"""Every kernel, compiled for GPUs that need not be there: see ``patchpack.testing.compiled``."""

import itertools

import pytest
import torch

from patchpack.testing import compiled
from patchpack.testing.catalogue import SPECS
from patchpack.testing.contract import LENGTH_SETS, Subject, backward, leaves, tensors

TARGETS = ("sm_80", "sm_90", "sm_100")


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
    for op, target in itertools.product(SPECS, TARGETS):
        cases = list(SPECS[op].cases)
        # registers are scarce in attention alone, and all targets have as many
        step = 1 if op == "varlen_attention" or target == TARGETS[0] else 2
        subjects = [Subject(op, case, torch.bfloat16) for case in cases[::step]]
        subjects += [Subject(op, case, torch.float32) for case in cases[:: 3 * step]]
        for first in range(0, len(subjects), 5):
            few = subjects[first : first + 5]
            params.append(pytest.param(few, target, id=f"{op}-{target}-{first}"))
    return params


@pytest.mark.parametrize(("subjects", "target"), _few_subjects())
def test_no_kernel_spills_registers(subjects, target):
    launches = [launch for subject in subjects for launch in compile_case(subject, target)]
    spilled = [launch for launch in launches if launch.spills or launch.stack]
    assert launches
    assert not spilled, compiled.report(spilled)


@pytest.mark.parametrize("op", SPECS)
def test_a_length_that_changes_does_not_recompile(op):
    subject = Subject(op, next(iter(SPECS[op].cases)), torch.bfloat16)
    keys = [
        {launch.key for launch in compile_case(subject, "sm_90", sizes=sizes)}
        for sizes in (*LENGTH_SETS, [(1, 4, 20), (3, 8, 12)], [(1, 4, 4)] * 16)
    ]
    assert keys[0]
    assert all(key == keys[0] for key in keys)
