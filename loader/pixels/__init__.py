"""Bytes to crops: tiles in memory-mapped shards. Needs numpy alone."""
