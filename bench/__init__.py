"""What is timed and compiled outside the tests: throughput against peers, and the ahead-of-time compilation of the kernels."""
