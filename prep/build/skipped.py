"""skipped.json: the images that were left out of a dataset, and why; read as what a stranger may have written."""

from pathlib import Path

from loader.errors import FormatError
from loader.format.strict_json import Fields, fail, load
from loader.system.safefile import read_member
from prep.build.records import parse_bad
from prep.build.staging import SKIPPED
from prep.shard.shard import Bad

LIMIT = 16 << 20  # bytes: tens of thousands of images


def read_skipped(folder: Path) -> list[Bad]:
    """Return the images that were left out of the dataset in a folder; none where skipped.json is missing.

    Raises:
        FormatError: it is damaged, too long, or no file.
    """
    path = folder / SKIPPED
    try:
        text = read_member(path, LIMIT)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise FormatError(f"{path}: expected a readable file, got {error.strerror}") from None
    entries = load(text, str(path))
    if type(entries) is not list:
        fail(str(path), "value", "a list", type(entries).__name__)
    return [parse_bad(Fields(entry, f"{path}: [{i}]")) for i, entry in enumerate(entries)]


def left_out(folder: Path) -> str:
    """Return what a verdict on the dataset in a folder should add about images left out of it; "" if there are none."""
    try:
        count = len(read_skipped(folder))
    except FormatError as error:
        return f"; which images were left out when it was built is not known: {error}"
    return f"; {count} images were left out when it was built, see {SKIPPED}" if count else ""
