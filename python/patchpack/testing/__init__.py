"""What tests, benchmarks and users share to check an op: cases, comparison, interpreter, compiler."""
