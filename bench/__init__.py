"""Throughput against peers, and ahead-of-time compilation of the kernels."""
