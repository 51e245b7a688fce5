"""The operating system: files, locks, threads, descriptors, memory and limits. Knows nothing of shards."""
