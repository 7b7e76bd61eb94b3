"""Everything is declared in pyproject.toml; the optional C++ extension of csrc/ will be built here."""

from setuptools import setup

setup()
