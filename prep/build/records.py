"""What an unfinished build writes down, as JSON in a line and its SHA-256 in another; read strictly, or not at all."""

import hashlib
import json
from typing import Any

from loader.errors import FormatError
from loader.format import layout as fmt
from loader.format.layout import Shard
from loader.format.strict_json import Fields, fail, load
from prep.build.terms import Terms
from prep.shard.shard import Bad, ImageRecord, Run, ShardRecord, Stamp

MAX_TEXT = 4096  # characters of a reason, a version and the like
MOST = 1 << 62


def dump_record(record: ShardRecord, build: str, max_pixels: int) -> bytes:
    """The record of a finished shard, of the build of that name."""
    images = [
        {
            "name": image.name,
            "height": image.height,
            "width": image.width,
            "runs": {fmt.plane_name(scale): _known(vars(run)) for scale, run in image.runs.items()},
        }
        for image in record.images
    ]
    facts = {
        "build": build,
        "max_pixels": max_pixels,
        "shard": record.shard and vars(record.shard),
        "images": images,
        "bad": [vars(bad) for bad in record.bad],
        "stamps": record.stamps,
    }
    return _dump(_known(facts))


def parse_record(text: bytes, where: str) -> tuple[str, int, ShardRecord]:
    """The name of a record's build, its limit of pixels, and the record.

    Raises:
        FormatError: it is damaged, or not of this form. That it is true, or of this build, is not known here.
    """
    fields = _load(text, where)
    build, max_pixels = fields.digest("build"), fields.integer("max_pixels", 1, MOST)
    record = ShardRecord(
        _shard(fields),
        [_image(image) for image in fields.objects("images")],
        [parse_bad(bad) for bad in fields.objects("bad")],
        [_stamp(stamp, where) for stamp in fields.take("stamps", list)],
    )
    fields.done()
    return build, max_pixels, record


def parse_bad(fields: Fields) -> Bad:
    """An image that was left out.

    Raises:
        FormatError: the fields are not those of one.
    """
    bad = Bad(fields.text("image"), fields.text("source"), fields.text("reason"))
    if not fmt.is_image_name(bad.image):
        fail(fields.where, "image", "the stem of a file name", ascii(bad.image[:80]))
    if not fmt.is_source_name(bad.source):
        fail(fields.where, "source", "a path within the source folder", ascii(bad.source[:80]))
    if len(bad.reason) > MAX_TEXT:
        fail(fields.where, "reason", f"at most {MAX_TEXT} characters", len(bad.reason))
    fields.done()
    return bad


def dump_terms(terms: Terms) -> bytes:
    """The text of build.json."""
    return _dump(vars(terms))


def parse_terms(text: bytes, where: str) -> Terms:
    """The terms in the text of a build.json.

    Raises:
        FormatError: it is damaged, or not of this form.
    """
    fields = _load(text, where)
    sources = fields.object("sources")
    terms = Terms(
        made_by=_short(fields, "made_by"),
        libraries=_libraries(fields),
        container=_short(fields, "container"),
        scales=_scales(fields.take("scales", list), where),
        tile=fields.integer("tile", *fmt.TILES),
        images_per_shard=fields.integer("images_per_shard", 1, MOST),
        lr=_short(fields, "lr"),
        sources={
            fmt.plane_name(scale): sources.strings(fmt.plane_name(scale))
            for scale in (fmt.HR, *fmt.SCALES)
            if fmt.plane_name(scale) in sources
        },
    )
    sources.done()
    fields.done()
    return terms


def _shard(fields: Fields) -> Shard | None:
    if "shard" not in fields:
        return None
    inner = fields.object("shard")
    shard = Shard(inner.text("file"), inner.integer("bytes", 1, MOST), inner.digest("sha256"))
    inner.done()
    return shard


def _image(fields: Fields) -> ImageRecord:
    name, height, width = fields.text("name"), *(fields.integer(key, 1, fmt.MAX_SIDE) for key in ("height", "width"))
    inner = fields.object("runs")
    runs = {
        scale: _run(inner.object(fmt.plane_name(scale)))
        for scale in (fmt.HR, *fmt.SCALES)
        if fmt.plane_name(scale) in inner
    }
    inner.done()
    fields.done()
    return ImageRecord(name, height, width, runs)


def _run(fields: Fields) -> Run:
    offset, crc32 = fields.integer("offset", 0, MOST), fields.integer("crc32", 0, 0xFFFFFFFF)
    has_source = "source" in fields
    source, digest = (fields.text("source"), fields.digest("source_sha256")) if has_source else (None, None)
    fields.done()
    return Run(offset, crc32, source, digest)


def _stamp(value: Any, where: str) -> Stamp:
    if value is None:
        return None
    if type(value) is not list or len(value) != 2 or {type(value[0]), type(value[1])} != {int}:
        fail(where, "stamps", "pairs of integers", type(value).__name__)
    return value[0], value[1]


def _scales(values: list[Any], where: str) -> list[int]:
    if any(type(value) is not int or value not in fmt.SCALES for value in values):
        fail(where, "scales", f"some of {fmt.SCALES}", "others")
    return values


def _libraries(fields: Fields) -> dict[str, str]:
    libraries = fields.texts("libraries")
    if any(len(text) > MAX_TEXT for item in libraries.items() for text in item):
        fail(fields.where, "libraries", f"at most {MAX_TEXT} characters each", "more")
    return libraries


def _short(fields: Fields, key: str) -> str:
    text = fields.text(key)
    if len(text) > MAX_TEXT:
        fail(fields.where, key, f"at most {MAX_TEXT} characters", len(text))
    return text


def _known(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if value is not None}


def _dump(facts: dict[str, Any]) -> bytes:
    body = json.dumps(facts, ensure_ascii=False).encode()
    return body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n"


def _load(text: bytes, where: str) -> Fields:
    body, _, digest = text.rstrip(b"\n").rpartition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise FormatError(f"{where}: expected JSON in a line and its SHA-256 in another, got others")
    return Fields(load(body, where), where)
