"""The network on the CPU: parts of it computed by the compiled mixing kernel, and the fallback without it."""
