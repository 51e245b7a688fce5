"""`python -m model.export`: see `model.enlarge.export`."""

from model.enlarge.export import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
