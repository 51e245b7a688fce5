"""Building datasets: plan, shards, index."""
