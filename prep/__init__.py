"""The offline side: folders of images in, shards out."""

__version__ = "0.1.0"
