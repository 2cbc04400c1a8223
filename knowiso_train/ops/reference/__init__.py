"""Plain torch: the truth that tests, benchmarks and the CPU path import. One file per operation."""
