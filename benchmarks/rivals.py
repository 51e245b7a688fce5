"""Ways of getting the same aligned crops: ours, those of other systems, and the physical limit, a plain memcpy.

Each reads the same batches of sample numbers and gives new arrays (lr, hr), neither collated nor transformed. Where
the crops of the coming batches are worked out beforehand, the rival is spared that time, and we are not.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import h5py
import numpy as np
from numpy.typing import NDArray

from loader import ImageDataset, PatchDataset
from loader.format import HR, plane_group
from loader.plan import Plan

Pixels = NDArray[np.uint8]
Read = Callable[[Sequence[int]], object]
Places = list[tuple[int, int, int]]  # image, top and left in LR pixels, by sample number


def places(data: PatchDataset, count: int) -> Places:
    """Where the first `count` samples of a PatchDataset without transforms come from."""
    plan = Plan(*data.shards.index.sizes(data.scale), data.lr_patch, data.seed, augment=False)
    crops = plan.crops(data.epoch, np.arange(count))
    return list(zip(crops.image.tolist(), crops.top.tolist(), crops.left.tolist(), strict=True))


def ours(data: PatchDataset) -> Read:
    """PatchDataset as torch's DataLoader calls it, plan included."""
    return data.__getitems__


def memcpy(data: PatchDataset, crops: Places) -> Read:
    """As many bytes, each crop in one piece from its image in the mapped shard, into a buffer that is kept."""
    sides = {data.scale: data.lr_patch, HR: data.lr_patch * data.scale}
    pieces: list[list[Pixels]] = []
    for image, top, left in crops:
        pieces.append([])
        for scale, side in sides.items():
            run, size = data.shards.tiles(image, scale).reshape(-1), side * side * 3
            start = (top * 509 + left) * 997 % (len(run) - size)
            pieces[-1].append(run[start : start + size])
    buffers: dict[int, list[Pixels]] = {}

    def read(samples: Sequence[int]) -> None:
        if len(samples) not in buffers:
            buffers[len(samples)] = [np.empty((len(samples), side * side * 3), np.uint8) for side in sides.values()]
        for out, column in zip(buffers[len(samples)], zip(*(pieces[n] for n in samples), strict=True), strict=True):
            for row, piece in zip(out, column, strict=True):
                np.copyto(row, piece)

    return read


def h5py_slices(data: PatchDataset, crops: Places) -> Read:
    """h5py on the same HDF5 shards, files and datasets kept open, slicing as its documentation shows."""
    index = data.shards.index
    files = [h5py.File(data.shards.folder / shard.file) for shard in index.shards]
    planes = {
        scale: [files[index.shard[i]][plane_group(scale)][index.name[i]] for i in range(len(index.name))]
        for scale in (data.scale, HR)
    }
    return lambda samples: [_slices(planes[data.scale], planes[HR], data, *crops[n]) for n in samples]


def png(data: PatchDataset, crops: Places, folder: Path) -> Read:
    """Whole HR and LR images decoded by OpenCV for each crop, as loaders of image folders do."""
    images = ImageDataset(data.shards.folder, data.scale)
    paths = {scale: [folder / f"x{scale}" / f"{name}.png" for name in images.names] for scale in (data.scale, HR)}
    for scale in paths:
        (folder / f"x{scale}").mkdir(parents=True, exist_ok=True)
        for i, path in enumerate(paths[scale]):
            if not path.exists():
                pixels = images[i][1 if scale == HR else 0].permute(1, 2, 0).numpy()
                cv2.imwrite(str(path), pixels[..., ::-1])

    def decode(scale: int, image: int) -> Pixels:
        pixels = cv2.imread(str(paths[scale][image]))
        assert pixels is not None, paths[scale][image]
        return pixels.astype(np.uint8, copy=False)

    def sample(image: int, top: int, left: int) -> tuple[Pixels, Pixels]:
        lr, hr = ({image: decode(scale, image)} for scale in (data.scale, HR))
        return _slices(lr, hr, data, image, top, left)

    return lambda samples: [sample(*crops[n]) for n in samples]


def _slices(
    lr: Sequence[Pixels] | Mapping[int, Pixels],
    hr: Sequence[Pixels] | Mapping[int, Pixels],
    data: PatchDataset,
    image: int,
    top: int,
    left: int,
) -> tuple[Pixels, Pixels]:
    """The crop out of anything that can be sliced like an array."""
    patch, scale = data.lr_patch, data.scale
    y, x, side = top * scale, left * scale, patch * scale
    return lr[image][top : top + patch, left : left + patch], hr[image][y : y + side, x : x + side].copy()
