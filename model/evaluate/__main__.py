"""`python -m model.evaluate`: see `model.evaluate.evaluate`."""

from model.evaluate.evaluate import main

if __name__ == "__main__":
    main()
