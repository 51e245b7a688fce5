"""Services of `train.py`: settings, ranks, memory, checkpoints, stop signals, validation and reporting."""
