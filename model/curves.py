"""`python -m model.curves`: see `model.evaluate.curves`."""

from model.evaluate.curves import main, write_curves

__all__ = ["main", "write_curves"]

if __name__ == "__main__":
    main()
