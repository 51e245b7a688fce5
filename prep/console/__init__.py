"""Shared by all commands: standard streams, path arguments, progress."""
