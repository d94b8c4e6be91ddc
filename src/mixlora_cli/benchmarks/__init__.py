"""The benchmarks: where each comes from, how it is asked, and how it is scored."""
