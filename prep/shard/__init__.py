"""One shard: its plan, how it is written, and how it is checked against the index."""
