"""Pairing HR images with given LR images, by name and by size."""

from collections.abc import Sequence
from pathlib import Path

from loader.errors import ShardsError
from loader.system.threads import in_threads
from prep.images.decode import read_size
from prep.images.faults import ImageError, shown
from prep.images.find import ImageFile, Note, find_images, is_folder, listing, same

HEADER_THREADS = 16  # headers are small reads: on network storage they take the time of a round trip each


def pair_lr(
    images: Sequence[ImageFile],
    folder: Path,
    scale: int,
    note: Note = lambda text: None,
    *,
    equal_names: bool = False,
) -> list[ImageFile]:
    """Return the LR file of each image: `folder/X4/0001x4.png`, or `folder/0001x4.png` where there is no folder X4.

    Names that differ in nothing but their Unicode normal form are the same. `note` is as for `find_images`.
    With `equal_names`, a folder whose files have exactly the names of the images is accepted too.

    Raises:
        ShardsError: listing every image without LR and every LR without image.
    """
    suffix = f"x{scale}"
    inner = folder / f"X{scale}"
    apart = is_folder(inner)
    files = {same(file.stem): file for file in find_images([inner if apart else folder], note)}
    stems = [same(image.stem) for image in images]
    if equal_names and files.keys() == set(stems):
        return [files[stem] for stem in stems]
    if not apart:  # files of several scales side by side
        files = {stem: file for stem, file in files.items() if stem.endswith(suffix)}
    wanted = {same(image.stem + suffix): image for image in images}
    problems = [f"{shown(image.path)}: no LR image {stem}" for stem, image in wanted.items() if stem not in files]
    problems += [f"{shown(file.path)}: no HR image for it" for stem, file in files.items() if stem not in wanted]
    if problems:
        raise ShardsError(listing(f"expected one LR image for each HR image at scale {scale}, got misfits", problems))
    return [files[stem] for stem in wanted]


def check_sizes(images: Sequence[ImageFile], lr: Sequence[ImageFile], scale: int) -> None:
    """Hold that each LR image is its HR image's size divided by the scale, rounded down or (as MATLAB does) up.

    Raises:
        ShardsError: listing every pair that does not fit, and every file whose header cannot be read.
        StorageError: headers cannot be read since the storage fails.
    """

    def misfit(pair: tuple[ImageFile, ImageFile]) -> str | None:
        try:
            (height, width), small = (read_size(file.path, place=file.place) for file in pair)
        except ImageError as error:
            return str(error)
        if lr_fits((height, width), small, scale):
            return None
        expected = f"{height // scale} × {width // scale}"
        return f"{shown(pair[1].path)}: expected {expected} for HR of {height} × {width}, got {small[0]} × {small[1]}"

    pairs = list(zip(images, lr, strict=True))
    if problems := list(filter(None, in_threads(misfit, pairs, HEADER_THREADS))):
        raise ShardsError(listing(f"expected LR sizes that fit scale {scale}, got misfits", problems))


def lr_fits(hr: tuple[int, int], lr: tuple[int, int], scale: int) -> bool:
    """Whether LR of a size (H, W) can belong to HR of a size."""
    return all(small in (big // scale, -(-big // scale)) for big, small in zip(hr, lr, strict=True))
