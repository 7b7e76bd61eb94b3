"""Faults of the tools that measure and check."""

from faults import Fault

FAULTS = [
    Fault(
        "traffic: a view is all of its buffer",
        "python/patchpack/testing/traffic.py",
        "near & (own == _in_each_byte(1, size))",
        "near",
        "tests/test_traffic.py -k between_the_rows",
    ),
    Fault(
        "traffic: programs may read what others write",
        "python/patchpack/testing/traffic.py",
        "_READ: _WRITTEN | _ATOMIC",
        "_READ: _ATOMIC",
        "tests/test_traffic.py -k what_another_writes",
    ),
    Fault(
        "bench: a provider's gradients are another's too",
        "bench/_harness.py",
        "own = [x.clone() for x in cotangents]",
        "own = cotangents",
        "tests/test_gpu_rehearsal.py -k spoils_nothing",
    ),
    Fault(
        "bench: inputs that a peer has changed are not put back",
        "bench/_harness.py",
        "            x.copy_(before)\n",
        "",
        "tests/test_gpu_rehearsal.py -k spoils_nothing",
    ),
    Fault(
        "bench: an op that fails does not fail the run",
        "bench/run.py",
        'if s.get("failed") and',
        "if False and",
        "tests/test_gpu_rehearsal.py -k triton_cannot_compile",
    ),
    Fault(
        "bench: a case beyond the memory of a GPU ends the op",
        "bench/_harness.py",
        "except torch.OutOfMemoryError as error:\n        reason",
        "except ZeroDivisionError as error:\n        reason",
        "tests/test_gpu_rehearsal.py -k triton_cannot_compile",
    ),
    Fault(
        "verify: a GPU that answers no more is asked on",
        "python/patchpack/cli/verify.py",
        "if not machine.answers(device):\n                    stopped",
        "if False:\n                    stopped",
        "tests/test_gpu_rehearsal.py -k answers_no_more",
    ),
    Fault(
        "interpreter: bf16 repair left out",
        "python/patchpack/_interpreter_arithmetic.py",
        "    if _stock_is_right():\n        yield",
        "    if True:\n        yield",
        "tests/test_interpreter.py",
    ),
]
