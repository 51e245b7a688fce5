"""`python -m model.upscale`: see `model.enlarge.upscale`."""

from model.enlarge.upscale import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
