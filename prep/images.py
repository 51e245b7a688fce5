"""Image files: finding them, pairing HR with given LR, and decoding them to 8-bit RGB or saying why not."""

import io
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from loader.format import ShardsError, is_image_name, one_line
from prep.png import metadata_behind_pixels

Pixels = NDArray[np.uint8]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "MPO", "BMP", "TIFF", "WEBP")  # as Pillow calls them; MPO is a camera's JPEG
MAX_PIXELS = 1 << 28  # by default: a quarter of a gigapixel
ORIENTATION = 0x0112  # the EXIF tag
HEADER_THREADS = 16  # headers are small reads: on network storage they take the time of a round trip each

Image.MAX_IMAGE_PIXELS = None  # the limit is ours
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what is wrong with a file, its ImageError tells
warnings.filterwarnings("ignore", module="PIL")  # about metadata: what matters of it is checked here


class ImageError(ShardsError):
    """An image file that cannot be used, and why, in one line."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


@dataclass(frozen=True)
class ImageFile:
    """An image file, and its name relative to the source it was found in (with forward slashes)."""

    path: Path
    name: str

    @property
    def stem(self) -> str:
        """The file's name without its suffix: the image's name in a dataset."""
        return self.path.stem


def find_images(sources: Sequence[Path]) -> list[ImageFile]:
    """All image files in folders (and the folders within) and among files, sorted by stem.

    Hidden files, files with other suffixes, and pipes and the like are passed over in folders; a file named outright
    must be an image.

    Raises:
        ShardsError: a source does not exist or holds no image, or images share a stem (all such are listed).
    """
    found = [file for source in sources for file in _find(source)]
    by_stem: dict[str, list[ImageFile]] = defaultdict(list)
    for file in found:
        if not is_image_name(file.stem) or not _is_utf8(file.name):
            raise ShardsError(f"{str(file.path)!a}: expected a file name in UTF-8, got one that is not")
        by_stem[file.stem].append(file)
    doubles = [f"{stem}: {', '.join(str(file.path) for file in files)}" for stem, files in by_stem.items() if files[1:]]
    if doubles:
        raise ShardsError(_listing("expected each stem once, since it names the image, got more", doubles))
    return sorted(found, key=lambda file: file.stem)


def pair_lr(images: Sequence[ImageFile], folder: Path, scale: int) -> list[ImageFile]:
    """The LR file of each image: `folder/X4/0001x4.png`, or `folder/0001x4.png` where there is no folder X4.

    Raises:
        ShardsError: listing every image without LR and every LR without image.
    """
    suffix = f"x{scale}"
    inner = folder / f"X{scale}"
    files = {file.stem: file for file in find_images([inner if inner.is_dir() else folder])}
    if not inner.is_dir():  # files of several scales side by side
        files = {stem: file for stem, file in files.items() if stem.endswith(suffix)}
    wanted = {image.stem + suffix: image for image in images}
    problems = [f"{image.path}: no LR image {stem}" for stem, image in wanted.items() if stem not in files]
    problems += [f"{file.path}: no HR image for it" for stem, file in files.items() if stem not in wanted]
    if problems:
        raise ShardsError(_listing(f"expected one LR image for each HR image at scale {scale}, got misfits", problems))
    return [files[stem] for stem in wanted]


def check_sizes(images: Sequence[ImageFile], lr: Sequence[ImageFile], scale: int) -> None:
    """Hold that each LR image is its HR image's size divided by the scale, rounded down or (as MATLAB does) up.

    Raises:
        ShardsError: listing every pair that does not fit, and every file whose header cannot be read.
    """

    def misfit(pair: tuple[ImageFile, ImageFile]) -> str | None:
        try:
            (height, width), small = read_size(pair[0].path), read_size(pair[1].path)
        except ImageError as error:
            return str(error)
        if lr_fits((height, width), small, scale):
            return None
        expected = f"{height // scale} × {width // scale}"
        return f"{pair[1].path}: expected {expected} for HR of {height} × {width}, got {small[0]} × {small[1]}"

    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        problems = list(filter(None, pool.map(misfit, zip(images, lr, strict=True))))
    if problems:
        raise ShardsError(_listing(f"expected LR sizes that fit scale {scale}, got misfits", problems))


def lr_fits(hr: tuple[int, int], lr: tuple[int, int], scale: int) -> bool:
    """Whether LR of a size (H, W) can belong to HR of a size."""
    return all(small in (big // scale, -(-big // scale)) for big, small in zip(hr, lr, strict=True))


def read_size(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width of an image as `read_image` gives it, from the file's header alone."""
    try:
        with path.open("rb") as file:
            height, width, turn = _header(file, str(path), max_pixels)
    except OSError as error:
        raise ImageError(f"{path}: {_why(error)}") from None
    return (width, height) if turn >= 5 else (height, width)


def read_image(path: Path) -> Pixels:
    """Decode an image file to uint8 RGB (H, W, 3); see `decode`."""
    try:
        return decode(path.read_bytes(), str(path))
    except OSError as error:
        raise ImageError(f"{path}: {_why(error)}") from None


def decode(data: bytes, where: str, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode the bytes of a PNG, JPEG, BMP, TIFF or WebP file to uint8 RGB (H, W, 3).

    Grey and palette images become RGB, an EXIF orientation is applied, a fully opaque alpha channel is dropped.
    Colour profiles are ignored, as everywhere in super-resolution.

    Raises:
        ImageError: the file is damaged, or more than 8 bits deep, transparent, CMYK, animated, of several pages,
            larger than `max_pixels`, or of another kind: what 8-bit RGB cannot hold faithfully.
    """
    height, width, turn = _header(io.BytesIO(data), where, max_pixels, whole=True)
    # Pillow reads headers of all kinds reliably, OpenCV keeps the depth of pixels and refuses cut files.
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ImageError(
            f"{where}: expected an image that OpenCV reads, got one that it does not: {error.err}"
        ) from None
    if pixels is None or pixels.shape[:2] != (height, width):
        raise ImageError(f"{where}: expected a whole image of {height} × {width}, got a cut or damaged file")
    if pixels.dtype != np.uint8:
        bits = pixels.dtype.itemsize * 8
        raise ImageError(f"{where}: expected 8 bits per channel, got {bits}; convert it first, as you see fit")
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        if (pixels[..., -1] != 255).any():
            raise ImageError(f"{where}: expected opaque pixels, got transparent ones; flatten it first")
        pixels = pixels[..., :-1]
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        rgb = np.repeat(pixels.reshape(height, width, 1), 3, axis=2)
    else:
        rgb = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    return np.ascontiguousarray(_upright(rgb.astype(np.uint8, copy=False), turn))


def _header(file: IO[bytes], where: str, max_pixels: int, whole: bool = False) -> tuple[int, int, int]:
    """Height and width as decoded, and the EXIF orientation (1 to 8), of a file of a kind that can be used.

    With `whole`, the checksums in a PNG file are held, too.
    """
    try:
        with Image.open(file) as image:
            _check_kind(image, where, max_pixels)
            width, height = image.size
            turn = _orientation(image, file, whole)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers meet damaged files with errors of every kind
        raise ImageError(f"{where}: {_why(error)}") from None
    return height, width, turn


def _check_kind(image: Image.Image, where: str, max_pixels: int) -> None:
    width, height = image.size
    if image.format not in FORMATS:
        raise ImageError(f"{where}: expected PNG, JPEG, BMP, TIFF or WebP, got {image.format}")
    if height * width > max_pixels:
        raise ImageError(f"{where}: expected at most {max_pixels} pixels, got {height} × {width}")
    if image.mode == "CMYK":
        raise ImageError(f"{where}: expected RGB or grey, got CMYK, whose colours need a profile; convert it first")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise ImageError(f"{where}: expected one picture, got {frames} (an animation or several pages)")


def _orientation(image: Image.Image, file: IO[bytes], whole: bool) -> int:
    if image.format == "TIFF":
        return 1  # libtiff's readers turn it themselves
    if image.format == "PNG" and not metadata_behind_pixels(file, whole):
        exif = Image.Image.getexif(image)  # PngImageFile's would decode the pixels
    else:
        exif = image.getexif()
    turn = exif.get(ORIENTATION)
    return turn if isinstance(turn, int) and 1 <= turn <= 8 else 1


def _upright(image: Pixels, orientation: int) -> Pixels:
    """Undo an EXIF orientation (TIFF 6.0, tag 274: where row 0 and column 0 of the stored image belong)."""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image


def _find(source: Path) -> Iterator[ImageFile]:
    if source.is_file():
        if source.suffix.lower() not in SUFFIXES:
            raise ShardsError(f"{source}: expected an image ({', '.join(SUFFIXES)}) or a folder, got {source.suffix!r}")
        yield ImageFile(source, source.name)
        return
    if not source.is_dir():
        raise ShardsError(f"{source}: expected a folder of images or an image file, got nothing there")
    empty = True
    for path in _walk(source):
        empty = False
        yield ImageFile(path, path.relative_to(source).as_posix())
    if empty:
        raise ShardsError(f"{source}: expected images ({', '.join(SUFFIXES)}), got none in this folder")


def _walk(folder: Path) -> Iterator[Path]:
    """Image files below a folder, through links too, yet each folder once."""
    seen, waiting = set(), [folder]
    while waiting:
        place = waiting.pop()
        try:
            here = place.stat()
            if (here.st_dev, here.st_ino) in seen:
                continue
            seen.add((here.st_dev, here.st_ino))
            with os.scandir(place) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            raise ImageError(f"{place}: expected a readable folder, got {error.strerror}") from None
        for entry in visible:
            kind = _kind(entry)
            if kind == "folder":
                waiting.append(place / entry.name)
            elif kind == "file" and entry.name.lower().endswith(SUFFIXES):
                yield place / entry.name


def _kind(entry: os.DirEntry[str]) -> str:
    """Whether this is a folder or a file; links that lead nowhere are files that cannot be read, pipes are neither."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists()):
            return "file"
    except OSError:  # a link to itself
        return "file"
    return "other"


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _why(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "expected PNG, JPEG, BMP, TIFF or WebP, got something else, or a damaged header"
    if isinstance(error, OSError) and error.strerror:
        return f"expected a readable file, got {error.strerror}"
    return f"expected a whole image, got a damaged one ({error})"


def _listing(head: str, problems: Iterable[str]) -> str:
    return "\n  ".join([f"{head}:", *map(one_line, problems)])
