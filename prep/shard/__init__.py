"""One shard: writing it, its record, checking it against the index."""
