"""The compiled mixing kernel, which computes unedited parts of the network on the CPU, and its fallback."""
