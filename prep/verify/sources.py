"""The files that a dataset was built from, found again by name and digest."""

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loader.format.layout import HR, RESIZES, Index
from loader.system.safefile import open_named
from prep.images.faults import NOT_FOUND, ImageError, StorageError
from prep.images.find import ImageFile
from prep.plan.dataset import Source
from prep.plan.recipe import Recipe


@dataclass(frozen=True)
class SourceImages:
    """Where the source images are: folders or single files, and the folder of LR images if LR was given."""

    folders: tuple[Path, ...]
    lr: Path | None = None

    def find(self, index: Index, image: int) -> Source:
        """Return the source files of one image; LR only if it was given and `lr` names its folder.

        Raises:
            StorageError: a file cannot be read, so it is unknown whether it has changed.
            ImageError: a file is missing, or has changed since the build.
        """
        lr = {}
        if index.lr.made == "given" and self.lr is not None:
            for scale in index.scales:
                inner = self.lr / f"X{scale}"
                lr[scale] = _matching_file(index, image, scale, (inner if _is_kind(inner, stat.S_ISDIR) else self.lr,))
        return Source(_matching_file(index, image, HR, self.folders), lr)

    def covers(self, index: Index) -> bool:
        """Return whether every plane can be compared."""
        return index.lr.made != "given" or self.lr is not None


def recipe_of(index: Index) -> Recipe:
    """Return the recipe by which a dataset was built, as far as its bytes depend on it."""
    lr = index.lr
    return Recipe(
        scales=index.scales,
        container=index.container,
        tile=index.planes[HR].tile,
        images_per_shard=index.images_per_shard,
        resize=lr.resize or RESIZES[0],
        border="replicate" if lr.border == "replicate" else "symmetric",
        given_lr=lr.made == "given",
        max_pixels=int((index.height * index.width).max()),
    )


def unreadable(path: Path | str, error: OSError) -> StorageError:
    """Return the error of a file that cannot be read: whether it has changed is unknown."""
    return StorageError(f"{path}: could not be read: {error.strerror or error}")


def _matching_file(index: Index, image: int, scale: int, folders: tuple[Path, ...]) -> ImageFile:
    """Return the file that a plane of an image was built from, by its name and digest."""
    plane = index.planes[scale]
    assert plane.source is not None
    assert plane.source_sha256 is not None
    name, expected = plane.source[image], plane.source_sha256[image]
    candidates = [folder / name if _is_kind(folder, stat.S_ISDIR) else folder for folder in folders]
    existing = [path for path in candidates if path.as_posix().endswith(name) and _is_kind(path, stat.S_ISREG)]
    if not existing:
        raise ImageError(f"{name}: expected this file in {', '.join(map(str, folders))}, got none")
    changed: list[str] = []
    failures: list[StorageError] = []
    for path in existing:
        try:
            digest = _sha256(path)
        except OSError as error:
            failures.append(unreadable(path, error))
            continue
        if digest == expected:
            return ImageFile(path, name)
        changed.append(f"{path}: changed since the build: sha256: expected {expected}, got {digest}")
    if failures:  # it may be the right one
        raise failures[0]
    raise ImageError(changed[0])


def _is_kind(path: Path, kind: Callable[[int], bool]) -> bool:
    """Return whether something of a kind exists at `path`; StorageError if that cannot be determined."""
    try:
        return kind(path.stat().st_mode)
    except OSError as error:
        if error.errno in NOT_FOUND:
            return False
        raise unreadable(path, error) from None


def _sha256(path: Path) -> str:
    with os.fdopen(open_named(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
