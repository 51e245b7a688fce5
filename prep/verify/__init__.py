"""Verifying datasets against their index and sources, and repairing them."""
