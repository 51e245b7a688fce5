"""The record of a finished shard as a file of sealed JSON; read strictly, or not at all."""

from dataclasses import dataclass
from typing import Any

from loader.format import layout as fmt
from loader.format.layout import Shard
from loader.format.strict_json import Fields
from prep.sealed import seal, unseal
from prep.shard.records import ImageRecord, Run, ShardRecord, Stamp
from prep.workspace.skipped import parse_skipped, skipped_facts

MOST = 1 << 62
LEVELS = {fmt.plane_name(level): level for level in (fmt.HR, *fmt.SCALES)}


@dataclass(frozen=True, kw_only=True)
class RecordFile:
    """A record, the digest of its build's manifest, and the limit on pixels that the build had."""

    build: str
    max_pixels: int
    record: ShardRecord


def dump_record(file: RecordFile) -> bytes:
    """Return the content of a record file."""
    record = file.record
    facts: dict[str, Any] = {
        "build": file.build,
        "max_pixels": file.max_pixels,
        "images": [
            {
                "name": image.name,
                "height": image.height,
                "width": image.width,
                "runs": {fmt.plane_name(level): _run_facts(run) for level, run in image.runs.items()},
            }
            for image in record.images
        ],
        "skipped": [skipped_facts(image) for image in record.skipped],
        "stamps": [_stamp_facts(stamp) for stamp in record.stamps],
    }
    if record.shard:
        facts["shard"] = {"file": record.shard.file, "bytes": record.shard.bytes, "sha256": record.shard.sha256}
    return seal(facts)


def parse_record(text: bytes, where: str) -> RecordFile:
    """Return what a record file says, which may still be false, or about another build.

    Raises:
        FormatError: it is damaged or malformed.
    """
    fields = unseal(text, where)
    build, max_pixels = fields.digest("build"), fields.integer("max_pixels", 1, MOST)
    record = ShardRecord(
        shard=_shard(fields.object("shard")) if "shard" in fields else None,
        images=[_image(image) for image in fields.objects("images")],
        skipped=[parse_skipped(image) for image in fields.objects("skipped")],
        stamps=[_stamp(stamp) for stamp in fields.objects("stamps")],
    )
    fields.done()
    return RecordFile(build=build, max_pixels=max_pixels, record=record)


def _run_facts(run: Run) -> dict[str, Any]:
    facts: dict[str, Any] = {"offset": run.offset, "crc32": run.crc32}
    if run.source is not None:
        facts |= {"source": run.source, "source_sha256": run.source_sha256}
    return facts


def _stamp_facts(stamp: Stamp) -> dict[str, Any]:
    facts: dict[str, Any] = {"image": stamp.image, "plane": fmt.plane_name(stamp.level)}
    if stamp.bytes is not None:
        facts |= {"bytes": stamp.bytes, "modified": stamp.modified}
    return facts


def _shard(fields: Fields) -> Shard:
    shard = Shard(file=fields.text("file"), bytes=fields.integer("bytes", 1, MOST), sha256=fields.digest("sha256"))
    fields.done()
    return shard


def _image(fields: Fields) -> ImageRecord:
    runs = fields.object("runs")
    image = ImageRecord(
        name=fields.text("name"),
        height=fields.integer("height", 1, fmt.MAX_SIDE),
        width=fields.integer("width", 1, fmt.MAX_SIDE),
        runs={level: _run(runs.object(plane)) for plane, level in LEVELS.items() if plane in runs},
    )
    runs.done()
    fields.done()
    return image


def _run(fields: Fields) -> Run:
    has_source = "source" in fields
    run = Run(
        offset=fields.integer("offset", 0, MOST),
        crc32=fields.integer("crc32", 0, 0xFFFFFFFF),
        source=fields.text("source") if has_source else None,
        source_sha256=fields.digest("source_sha256") if has_source else None,
    )
    fields.done()
    return run


def _stamp(fields: Fields) -> Stamp:
    known = "bytes" in fields
    stamp = Stamp(
        image=fields.text("image"),
        level=LEVELS[fields.choice("plane", tuple(LEVELS))],
        bytes=fields.integer("bytes", 0, MOST) if known else None,
        modified=fields.integer("modified", -MOST, MOST) if known else None,
    )
    fields.done()
    return stamp
