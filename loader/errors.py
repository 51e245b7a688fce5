"""The root of this project's errors, and foreign text made safe to print."""


class ShardsError(Exception):
    """Root of all errors of this project; the message says what, where, what was expected and what was got.

    Messages are printable: everything but line breaks is escaped.
    """

    def __init__(self, text: str) -> None:
        super().__init__("\n".join(map(one_line, text.split("\n"))))


class FormatError(ShardsError):
    """A violation of the dataset format; its message is one line."""

    def __init__(self, text: str) -> None:
        # torch's DataLoader raises a worker's error again with the worker's traceback as text: keep its line breaks.
        super().__init__(text if text.startswith("Caught FormatError in ") else one_line(text))


def one_line(text: str) -> str:
    """Return text with line breaks and unprintable characters escaped: file names may hold any bytes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
