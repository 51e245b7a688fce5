"""Verifying datasets against their index and their sources, and repairing them."""
