"""From bytes to crops: tiles in memory-mapped shards. Depends on numpy only."""
