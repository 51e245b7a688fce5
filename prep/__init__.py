"""The offline side: folders of images in, shards out."""

from srshards_names import check_names

__version__ = "0.1.0"

check_names("prep", "loader")
