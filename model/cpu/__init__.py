"""The fused CPU operations of the network: the compiled kernel, its fallback, and where it may stand in."""
