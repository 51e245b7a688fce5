"""What `train.py` needs beside the network, each part alone: settings, ranks, memory, saving, stopping, reports."""
