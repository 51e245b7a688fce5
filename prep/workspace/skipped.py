"""The list of skipped images, skipped.json. It is untrusted input."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loader.errors import FormatError
from loader.format import layout as fmt
from loader.format.strict_json import Fields, fail, load
from loader.system.safefile import read_member
from prep.shard.records import SkippedImage

LIMIT = 16 << 20  # bytes: tens of thousands of images
MAX_REASON = 4096  # characters


def dump_skipped(images: Sequence[SkippedImage]) -> bytes:
    """Return the content of a list of skipped images."""
    text = json.dumps([skipped_facts(image) for image in images], indent=1, ensure_ascii=False)
    return text.encode() + b"\n"


def read_skipped_list(path: Path) -> list[SkippedImage]:
    """Return the skipped images listed in a file; none if it does not exist.

    Raises:
        FormatError: it is damaged, too long, or not a file.
    """
    try:
        text = read_member(path, LIMIT)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise FormatError(f"{path}: expected a readable file, got {error.strerror}") from None
    entries = load(text, str(path))
    if type(entries) is not list:
        fail(str(path), "value", "a list", type(entries).__name__)
    return [parse_skipped(Fields(entry, f"{path}: [{i}]")) for i, entry in enumerate(entries)]


def skipped_facts(image: SkippedImage) -> dict[str, Any]:
    """Return a skipped image as JSON."""
    return {"image": image.image, "source": image.source, "reason": image.reason}


def parse_skipped(fields: Fields) -> SkippedImage:
    """Return the skipped image in a JSON object.

    Raises:
        FormatError: the fields are malformed.
    """
    image = SkippedImage(image=fields.text("image"), source=fields.text("source"), reason=fields.text("reason"))
    if not fmt.is_image_name(image.image):
        fail(fields.where, "image", "the stem of a file name", ascii(image.image[:80]))
    if not fmt.is_source_name(image.source):
        fail(fields.where, "source", "a path within the source folder", ascii(image.source[:80]))
    if len(image.reason) > MAX_REASON:
        fail(fields.where, "reason", f"at most {MAX_REASON} characters", len(image.reason))
    fields.done()
    return image
