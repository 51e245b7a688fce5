"""The errors of this project, and foreign text made safe to print."""


class ShardsError(Exception):
    """Root of the errors that a user can mend; its text says what, where, what was expected and what was got.

    Foreign text in it is printable: everything but the line breaks between its lines is escaped.
    """

    def __init__(self, text: str) -> None:
        super().__init__("\n".join(map(one_line, text.split("\n"))))


class FormatError(ShardsError):
    """A dataset that does not keep to the format, told in one line."""

    def __init__(self, text: str) -> None:
        # torch's DataLoader raises a worker's error again, below the worker's traceback: its lines stay lines.
        super().__init__(text if text.startswith("Caught FormatError in ") else one_line(text))


def one_line(text: str) -> str:
    """A text with what would break its line, or cannot be printed, as escapes: names of files may hold any bytes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
