"""Enlarging images with a network: tiles, upscalers, picture files, ONNX export."""
