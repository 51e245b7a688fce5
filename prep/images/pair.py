"""Pairing HR images with given LR images, by name and by size."""

from collections.abc import Sequence
from pathlib import Path

from loader.errors import ShardsError
from loader.system.threads import in_threads
from prep.images.decode import read_size
from prep.images.faults import ImageError, shown
from prep.images.find import ImageFile, Note, find_images, is_folder, listing, normalized

HEADER_THREADS = 16  # on network storage each header takes a round trip


def pair_lr(
    images: Sequence[ImageFile],
    folder: Path,
    scale: int,
    note: Note = lambda text: None,
    *,
    equal_names: bool = False,
) -> list[ImageFile]:
    """Return the LR file of each image: `folder/X4/0001x4.png`, or `folder/0001x4.png` if there is no folder X4.

    Names that differ only in Unicode normal form match. `note` is as for `find_images`. With `equal_names`, a folder
    whose files have exactly the names of the images is accepted too.

    Raises:
        ShardsError: HR and LR do not match; the text lists every HR image without LR and every LR image without HR.
    """
    suffix = f"x{scale}"
    inner = folder / f"X{scale}"
    has_inner = is_folder(inner)
    files = {normalized(file.stem): file for file in find_images([inner if has_inner else folder], note)}
    stems = [normalized(image.stem) for image in images]
    if equal_names and files.keys() == set(stems):
        return [files[stem] for stem in stems]
    if not has_inner:  # files of several scales in one folder
        files = {stem: file for stem, file in files.items() if stem.endswith(suffix)}
    wanted = {normalized(image.stem + suffix): image for image in images}
    problems = [f"{shown(image.path)}: no LR image {stem}" for stem, image in wanted.items() if stem not in files]
    problems += [f"{shown(file.path)}: no HR image" for stem, file in files.items() if stem not in wanted]
    if problems:
        raise ShardsError(
            listing(f"expected one LR image for each HR image at scale {scale}, got mismatches", problems)
        )
    return [files[stem] for stem in wanted]


def check_sizes(images: Sequence[ImageFile], lr: Sequence[ImageFile], scale: int) -> None:
    """Check that each LR image has its HR image's size divided by the scale, rounded down or (as in MATLAB) up.

    Raises:
        ShardsError: sizes do not match; the text lists every such pair and every file with an unreadable header.
        StorageError: the storage fails.
    """

    def mismatch(pair: tuple[ImageFile, ImageFile]) -> str | None:
        try:
            (height, width), small = (read_size(file.path, folder=file.folder) for file in pair)
        except ImageError as error:
            return str(error)
        if lr_fits((height, width), small, scale):
            return None
        expected = f"{height // scale} × {width // scale}"
        return f"{shown(pair[1].path)}: expected {expected} for HR of {height} × {width}, got {small[0]} × {small[1]}"

    pairs = list(zip(images, lr, strict=True))
    if problems := list(filter(None, in_threads(mismatch, pairs, HEADER_THREADS))):
        raise ShardsError(listing(f"expected LR sizes that match scale {scale}, got mismatches", problems))


def lr_fits(hr: tuple[int, int], lr: tuple[int, int], scale: int) -> bool:
    """Return whether an LR size (H, W) matches an HR size."""
    return all(small in (big // scale, -(-big // scale)) for big, small in zip(hr, lr, strict=True))
