"""Benchmark of whether storage keeps up with training."""
