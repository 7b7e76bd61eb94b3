"""Triton kernels and their launchers; private. Arguments are checked in ``patchpack.ops``."""
