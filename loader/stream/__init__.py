"""The stream of batches: iterator, position, and buffers."""
