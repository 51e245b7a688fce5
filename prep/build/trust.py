"""What a record of a finished shard must be before a build takes the shard for its own.

All of this proves that a record, its shard and the plan agree with each other; not who made them. That only the owner
of a folder can have made what lies there follows from nobody else being able to write there, or from `prep verify
--source`, which makes every pixel anew.
"""

import hashlib
import os
import stat
from grp import getgrgid
from pathlib import Path
from pwd import getpwuid

from loader.errors import FormatError
from loader.format.index_text import dump_index, parse_index
from loader.format.layout import HR, Shard, plane_name
from loader.system.safefile import is_own, open_own
from prep.build.indexing import make_index
from prep.images.decode import read_size
from prep.images.faults import ImageError
from prep.shard.checksums import check_bytes
from prep.shard.hdf5 import check_hdf5
from prep.shard.shard import ShardPlan, ShardRecord, Source


def need_fit(record: ShardRecord, plan: ShardPlan) -> None:
    """Hold that a record tells of the images, files and planes of a plan, and of nothing else.

    Raises:
        FormatError: it does not.
    """
    where = plan.file
    if record.shard and record.shard.file != where:
        raise FormatError(f"{where}: expected a record of this file, got {record.shard.file!r}")
    if (record.shard is None) != (not record.images):
        raise FormatError(f"{where}: expected a shard where there are images, got one without the other")
    sources = {source.image.stem: source for source in plan.sources}
    names = [entry.name for entry in record.images], [entry.image for entry in record.bad]
    if sorted(names[0] + names[1]) != sorted(sources):
        raise FormatError(f"{where}: expected the {len(sources)} images of the plan, got others")
    if any(part != [name for name in sources if name in set(part)] for part in names):
        raise FormatError(f"{where}: expected images in the order of the plan, got another")
    for bad in record.bad:
        if bad.source not in {file.name for file in sources[bad.image].files}:
            raise FormatError(f"{where}: expected a file of image {bad.image!r}, got {bad.source!r}")
    for image in record.images:
        source = sources[image.name]
        _need_size(source, image.height, image.width, plan.recipe.max_pixels)
        found = {scale: run.source for scale, run in image.runs.items()}
        if found != (wanted := _files(source, plan)):
            raise FormatError(f"{where}: image {image.name!r}: expected planes from {wanted}, got {found}")


def need_unharmed(path: Path, record: ShardRecord, plan: ShardPlan) -> None:
    """Hold that a shard is a file of this user, and holds what its record says, to the last byte, padding included.

    Raises:
        FormatError: it does not.
        OSError: it cannot be read, or is not this user's.
    """
    descriptor = open_own(path)
    try:
        index = parse_index(dump_index(make_index(plan.recipe, [record])), str(path))  # as readers will see it
        if (length := os.fstat(descriptor).st_size) != index.shards[0].bytes:
            raise FormatError(f"{path}: expected {index.shards[0].bytes} bytes, got {length}")
        findings = check_bytes(descriptor, path, index, 0, lambda: None)
        if index.container == "hdf5" and not findings:
            findings += check_hdf5(descriptor, path, index, 0)
    finally:
        os.close(descriptor)
    if findings:
        raise FormatError(findings[0].text)


def has_digest(descriptor: int, shard: Shard) -> bool:
    """Whether an open file has the length and SHA-256 of a shard; it is closed then.

    Raises:
        OSError: it cannot be read.
    """
    with os.fdopen(descriptor, "rb") as file:
        whole = os.fstat(descriptor).st_size == shard.bytes
        return whole and hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256


def others_who_can_write(folder: Path) -> str | None:
    """Who besides this user can replace files in a folder, in words; None where nobody can."""
    found = folder.stat()
    if not is_own(found, folder) and found.st_uid != 0:
        return f"its owner, user {found.st_uid}"
    if found.st_mode & stat.S_ISVTX:  # as in /tmp: files are their owners' alone
        return None
    if found.st_mode & stat.S_IWOTH:
        return "everyone"
    if found.st_mode & stat.S_IWGRP and not _is_own_group(found.st_gid):
        return f"its group, {found.st_gid}"
    return None


def _is_own_group(number: int) -> bool:
    """Whether a group is this user's alone, as many systems give one to each."""
    try:
        group, user = getgrgid(number), getpwuid(os.geteuid())
    except KeyError:
        return False
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def _files(source: Source, plan: ShardPlan) -> dict[int, str | None]:
    """The name of the file that each plane of an image comes from, by scale; None where it is made from HR."""
    given = {scale: file.name for scale, file in source.lr.items()}
    return {HR: source.image.name} | {scale: given.get(scale) for scale in plan.recipe.scales}


def _need_size(source: Source, height: int, width: int, max_pixels: int) -> None:
    try:
        size = read_size(source.image.path, max_pixels)
    except ImageError as error:
        raise FormatError(str(error)) from None
    if {height, width} != set(size):  # TIFF's header does not tell which way up
        expected = f"{size[0]} × {size[1]} pixels, as {plane_name(HR)}"
        raise FormatError(f"{source.image.path}: expected {expected} has, got {height} × {width}")
