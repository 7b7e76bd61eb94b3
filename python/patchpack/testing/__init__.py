"""What tests, benchmarks and users share: cases, comparison, contract, compiled kernels."""

from patchpack._interpreter import interpreted as interpreted
