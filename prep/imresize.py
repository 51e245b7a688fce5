"""MATLAB's bicubic imresize: `from prep.imresize import imresize`; see `loader.resize.imresize`."""

from loader.resize.imresize import enlarge, imresize

__all__ = ["enlarge", "imresize"]
