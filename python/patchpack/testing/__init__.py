"""What tests, benchmarks and users share: cases, comparison, contract, compiled kernels."""
