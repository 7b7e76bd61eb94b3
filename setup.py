"""Everything is declared in pyproject.toml; csrc/ will be built from here (see csrc/README.md)."""

from setuptools import setup

setup()
