"""Faults of the ops that write where they read."""

from faults import Fault

FAULTS = [
    Fault(
        "in place: heads past the first go where those of an op that allocates do",
        "kernels/_rotary.py",
        "step if IN_PLACE else BLOCK_H * HEAD_DIM",
        "BLOCK_H * HEAD_DIM",
        "tests/test_in_place.py -k bits_of_the_op_that_allocates",
    ),
    Fault(
        "in place: autograd is not told",
        "python/patchpack/ops/_in_place.py",
        "ctx.mark_dirty(qkv)",
        "pass",
        "tests/test_in_place.py -k refuses",
    ),
    Fault(
        "in place: the cotangent is overwritten",
        "python/patchpack/ops/_in_place.py",
        "grad.clone(memory_format=torch.contiguous_format)",
        "grad.contiguous()",
        "tests/test_in_place.py -k bits_of_the_op_that_allocates",
    ),
    Fault(
        "in place: the adjoint turns forward",
        "python/patchpack/ops/_in_place.py",
        "not ctx.inverse",
        "ctx.inverse",
        "tests/test_in_place.py -k bits_of_the_op_that_allocates",
    ),
    Fault(
        "in place: elements that share memory are accepted",
        "python/patchpack/ops/_in_place.py",
        "x.stride(dim) >= reach",
        "x.stride(dim) > 0",
        "tests/test_in_place.py -k bad_arguments",
    ),
    Fault(
        "in place: traced as if there were no gradient",
        "python/patchpack/ops/_in_place.py",
        'return impl == "reference" or traced',
        'return impl == "reference"',
        "tests/test_in_place.py -k compiled_has-and-native",
    ),
]
