"""What all commands share: standard streams, path arguments, progress bars."""
