"""Image files: finding, pairing and decoding them."""
