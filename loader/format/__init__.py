"""The on-disk format: FORMAT.md as code. Needs only numpy."""
