"""Which finished shards a build may reuse.

The checks prove that record, shard and plan agree, not who made them. If nobody else can write to the folder, its owner
did. Otherwise only `prep verify --source` proves the pixels: it makes them all again.
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
from loader.system.safefile import is_own, open_member, open_own
from prep.images.decode import read_size
from prep.images.faults import ImageError
from prep.plan.dataset import ShardPlan, Source
from prep.plan.recipe import Recipe
from prep.shard.checksums import check_open_shard
from prep.shard.hdf5 import check_open_hdf5
from prep.shard.records import ShardRecord
from prep.workspace.indexing import make_index


def check_record(record: ShardRecord, plan: ShardPlan, recipe: Recipe) -> None:
    """Check that a record lists exactly the images, files and planes of a plan.

    Raises:
        FormatError: it does not.
    """
    where = plan.file
    if record.shard and record.shard.file != where:
        raise FormatError(f"{where}: expected a record of this file, got {record.shard.file!r}")
    if (record.shard is None) != (not record.images):
        raise FormatError(f"{where}: expected a shard if and only if there are images, got one without the other")
    sources = {source.name: source for source in plan.sources}
    used, skipped = [image.name for image in record.images], [image.image for image in record.skipped]
    if sorted(used + skipped) != sorted(sources):
        raise FormatError(f"{where}: expected the {len(sources)} images of the plan, got others")
    if any(names != [name for name in sources if name in set(names)] for names in (used, skipped)):
        raise FormatError(f"{where}: expected images in the plan's order, got another")
    for image in record.skipped:
        if image.source not in {file.name for file in sources[image.image].files.values()}:
            raise FormatError(f"{where}: expected a file of image {image.image!r}, got {image.source!r}")
    for stored in record.images:
        source = sources[stored.name]
        _check_size(source, stored.height, stored.width, recipe.max_pixels)
        found = {level: run.source for level, run in stored.runs.items()}
        if found != (wanted := _planes(source, recipe)):
            raise FormatError(f"{where}: image {stored.name!r}: expected planes from {wanted}, got {found}")


def check_shard_file(path: Path, record: ShardRecord, recipe: Recipe) -> None:
    """Check that a shard is this user's file, and that every byte is as recorded, padding included.

    Raises:
        FormatError: it differs from its record.
        OSError: it cannot be read, or belongs to another user.
    """
    descriptor = open_own(path)
    try:
        index = parse_index(dump_index(make_index(recipe, [record])), str(path))  # as a reader would see it
        if (length := os.fstat(descriptor).st_size) != index.shards[0].bytes:
            raise FormatError(f"{path}: expected {index.shards[0].bytes} bytes, got {length}")
        findings = check_open_shard(descriptor, path, index, 0, lambda: None)
        if index.container == "hdf5" and not findings:
            findings += check_open_hdf5(descriptor, path, index, 0)
    finally:
        os.close(descriptor)
    if findings:
        raise FormatError(findings[0].text)


def has_digest(path: Path, shard: Shard) -> bool:
    """Return whether a file is readable and has the length and SHA-256 recorded for a shard."""
    try:
        with os.fdopen(open_member(path), "rb") as file:
            if os.fstat(file.fileno()).st_size != shard.bytes:
                return False
            return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    except OSError:
        return False


def other_writers(folder: Path) -> str | None:
    """Return who else can replace files in a folder, as text; None if only this user (or root) can."""
    found = folder.stat()
    if not is_own(found, folder) and found.st_uid != 0:
        return f"its owner, user {found.st_uid}"
    if found.st_mode & stat.S_ISVTX:  # sticky, as /tmp: only owners can replace their files
        return None
    if found.st_mode & stat.S_IWOTH:
        return "everyone"
    if found.st_mode & stat.S_IWGRP and not _is_own_group(found.st_gid):
        return f"its group, {found.st_gid}"
    return None


def _is_own_group(number: int) -> bool:
    """Return whether this user is the only member of a group: many systems create such a group for each user."""
    try:
        group, user = getgrgid(number), getpwuid(os.geteuid())
    except KeyError:
        return False
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def _planes(source: Source, recipe: Recipe) -> dict[int, str | None]:
    """Return the source file name of each plane of an image; None for planes made from HR."""
    files = {level: file.name for level, file in source.files.items()}
    return {level: files.get(level) for level in (HR, *recipe.scales)}


def _check_size(source: Source, height: int, width: int, max_pixels: int) -> None:
    try:
        size = read_size(source.image.path, max_pixels)
    except ImageError as error:
        raise FormatError(str(error)) from None
    if {height, width} != set(size):  # a TIFF header does not give the orientation
        expected = f"{size[0]} × {size[1]} pixels in plane {plane_name(HR)}"
        raise FormatError(f"{source.image.path}: expected {expected}, got {height} × {width}")
