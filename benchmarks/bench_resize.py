"""Downscaling compared with decoding: HR → ×2 and ×4 of one 2040 × 1356 photograph, against decoding its PNG.

python benchmarks/bench_resize.py [IMAGE]     # default: a mosaic of scikit-image's photographs

Everything runs on one thread. Each round times each task once; ratios are medians over rounds.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import cv2
from common import machine, median_ratio, mosaic, rounds, table

from loader.resize import imresize as module
from loader.resize.imresize import imresize
from prep.images.decode import read_image
from prep.images.sample import sample_photographs


@click.command()
@click.argument("image", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--rounds", "count", default=15, show_default=True)
def main(image: Path | None, count: int) -> None:
    """Time decoding and downscaling of one IMAGE."""
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = image or Path(folder, "mosaic.png")
        if image is None:
            pixels = mosaic([read_image(photograph) for photograph in sample_photographs()], 1356, 2040, seed=0)
            cv2.imwrite(str(path), pixels[..., ::-1])
        measure(path, count)


def measure(path: Path, count: int) -> None:
    """Print the table for one image file."""
    hr = read_image(path)
    kernels = {"compiled": module.resize_kernel, "fallback": None}
    if module.resize_kernel is None:
        print("the C extension is not built: measuring the fallback only")
        del kernels["compiled"]

    def shrink(kernel: object, scales: tuple[int, ...]) -> Callable[[], object]:
        def work() -> None:
            module.resize_kernel = kernel
            for scale in scales:
                imresize(hr, scale)

        return work

    works: dict[str, Callable[[], object]] = {"cv2.imread of the PNG": lambda: cv2.imread(str(path))}
    for name, kernel in kernels.items():
        for scales in ((2, 4), (2,), (3,), (4,), (8,)):
            works[f"{name}: {' and '.join(f'×{scale}' for scale in scales)}"] = shrink(kernel, scales)
    times = rounds(works, count)
    decode = times["cv2.imread of the PNG"]
    rows = [
        [name, f"{statistics.median(each) * 1e3:.1f}", f"{median_ratio(each, decode):.0%}"]
        for name, each in times.items()
    ]
    print(f"{path.name}: {hr.shape[0]} × {hr.shape[1]}, {path.stat().st_size / 1e6:.1f} MB; {machine()}; one thread\n")
    print(table(["work", "ms", "of decoding"], rows))


if __name__ == "__main__":
    main()
