"""Systems that benchmarks compare, a file per system."""
