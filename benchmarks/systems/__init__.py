"""The systems that benchmarks run, one file each."""
