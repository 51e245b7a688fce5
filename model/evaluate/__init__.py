"""Scores of networks on test images, sample sheets, and training curves."""
