"""The plan of a dataset: which image goes into which shard. It is complete before any pixel is read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from loader.format.layout import HR, plane_name, shard_file
from prep.images.find import ImageFile
from prep.images.pair import check_sizes, pair_lr
from prep.plan.manifest import MADE_BY, Manifest, libraries, lr_text
from prep.plan.recipe import Recipe

Note = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """The source files of one image: HR, and LR by scale where LR is given."""

    image: ImageFile
    lr: dict[int, ImageFile] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The image's name in the dataset."""
        return self.image.stem

    @property
    def files(self) -> dict[int, ImageFile]:
        """The files by the level of the plane they fill."""
        return {HR: self.image, **self.lr}


@dataclass(frozen=True)
class ShardPlan:
    """One shard: its file name, and its images in order."""

    file: str
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class DatasetPlan:
    """A dataset to be built: its folder, its recipe, and its shards."""

    folder: Path
    recipe: Recipe
    shards: tuple[ShardPlan, ...]

    @property
    def sources(self) -> list[Source]:
        """All images in order."""
        return [source for shard in self.shards for source in shard.sources]

    @cached_property
    def manifest(self) -> Manifest:
        """What identifies the build of this plan."""
        recipe, sources = self.recipe, self.sources
        named = {plane_name(HR): [source.image.name for source in sources]}
        if recipe.given_lr:
            named |= {plane_name(scale): [source.lr[scale].name for source in sources] for scale in recipe.scales}
        return Manifest(
            made_by=MADE_BY,
            libraries=libraries(recipe.container),
            container=recipe.container,
            scales=list(recipe.scales),
            tile=recipe.tile,
            images_per_shard=recipe.images_per_shard,
            lr=lr_text(recipe.lr),
            sources=named,
        )


def plan_dataset(
    images: Sequence[ImageFile], recipe: Recipe, folder: Path, lr: Path | None = None, note: Note = lambda text: None
) -> DatasetPlan:
    """Return the plan of a dataset: the images in order, `recipe.images_per_shard` to a shard.

    Args:
        images: as returned by `find_images`.
        recipe: how to store them.
        folder: where to build the dataset.
        lr: a folder of LR images to store instead of making LR.
        note: called with messages for the user, such as LR images reached through links.

    Raises:
        ShardsError: LR images are missing, left over, or of the wrong size (all are listed).
    """
    given = {scale: pair_lr(images, lr, scale, note) for scale in recipe.scales} if lr else {}
    for scale, files in given.items():
        check_sizes(images, files, scale)
    sources = [Source(image, {scale: files[i] for scale, files in given.items()}) for i, image in enumerate(images)]
    step = recipe.images_per_shard
    shards = [
        ShardPlan(shard_file(number, recipe.container), tuple(sources[start : start + step]))
        for number, start in enumerate(range(0, len(sources), step))
    ]
    return DatasetPlan(folder, recipe, tuple(shards))


def default_images_per_shard(count: int) -> int:
    """Return the default for `count` images: 16 shards, which as many cores can build at once, of 8 to 64 images."""
    return min(max(-(-count // 16), 8), 64)
