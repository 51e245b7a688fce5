"""Offline preparation: builds shards from folders of images, verifies and benchmarks them."""

from srshards_names import check_names

__version__ = "0.1.0"

check_names("prep", "loader")
