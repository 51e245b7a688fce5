"""Measuring whether storage keeps up with training."""
