"""The folder of a dataset: its files, its lock, the state of a build in it."""
