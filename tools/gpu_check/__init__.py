"""Proof of the GPU kernels on the machine at hand: tests, sanitizer, benchmark, one record."""
