"""Enlarging images with a network: tiles, upscaling pictures, ONNX export."""
