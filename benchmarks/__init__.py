"""Benchmarks of the kernels: every row is checked against the reference before it is timed."""
