"""Scoring networks on test images, and the pictures drawn of results and runs."""
