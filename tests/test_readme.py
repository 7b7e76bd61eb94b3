"""What README shows works as it stands there."""

import re
from pathlib import Path

import pytest

from patchpack.testing.catalogue import SPECS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_run(example):
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})


def test_there_are_examples():
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("op", SPECS)
def test_every_op_is_in_the_table(op):
    assert re.search(rf"^\| `{op}\(", README, re.MULTILINE)


def test_make_targets_exist():
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_pictures_and_files_it_names_exist():
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / path).exists(), path
