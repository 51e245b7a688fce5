"""What to build: the recipe, which image goes into which shard, and the manifest that identifies a build."""
