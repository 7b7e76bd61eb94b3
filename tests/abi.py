"""One wheel on several versions of torch: ``python tests/abi.py patchpack.whl 2.10.0 2.14.0``.

The native ops of the wheel are verified in a new environment for each version, which is removed
again. An environment may take six gigabytes: the index decides for which CUDA a torch is built.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

VERIFY = """
import sys, patchpack
from patchpack.__main__ import main
from patchpack.testing.catalogue import SPECS
ops = [op for op in SPECS if patchpack.available(op, "native") is None]
status = [main(["verify", "--impl", "native", "--device", "cpu", "--op", op]) for op in ops]
sys.exit(max(status, default=patchpack.available("rope", "native")))
"""


def verify(wheel: Path, torch: str) -> bool:
    """Whether the native ops of ``wheel`` pass their contract on this version of torch."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = f"{folder}/bin/python"
        install = ("-m", "pip", "install", "-q", f"torch=={torch}", wheel, "rich")
        for command in (install, ("-c", VERIFY)):
            status = subprocess.run([python, *command], cwd=folder).returncode
            if status:
                break
    seconds = time.monotonic() - start
    print(f"torch {torch}: {'FAILED' if status else 'ok'}, {seconds:.0f} s", flush=True)
    return not status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path, help="a wheel with the extension")
    parser.add_argument("torch", nargs="+", help="versions")
    arguments = parser.parse_args()
    wheel = arguments.wheel.resolve(strict=True)
    passed = [verify(wheel, torch) for torch in arguments.torch]
    sys.exit(not all(passed))
