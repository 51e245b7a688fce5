"""Comparing a complete dataset with a plan."""

from collections.abc import Callable, Sequence

from loader.errors import ShardsError, one_line
from loader.format.index import read_index
from loader.format.layout import HR, Index, plane_name
from loader.system.threads import in_threads
from prep.images.faults import shown
from prep.plan.dataset import DatasetPlan
from prep.plan.manifest import MADE_BY, Manifest, differences, lr_text
from prep.shard.records import SkippedImage
from prep.workspace.trust import has_digest
from prep.workspace.workspace import Workspace


def check_dataset(
    plan: DatasetPlan, workers: int, skip_bad: bool, report: Callable[[int], None], note: Callable[[str], None]
) -> tuple[Index, list[SkippedImage]]:
    """Check that a plan's folder holds its dataset, with all shards undamaged. Return index and skipped images.

    Compares the names of source files, not their pixels.

    Raises:
        ShardsError: the dataset differs, or shards are damaged; all differences or damaged shards are listed.
    """
    workspace = Workspace(plan.folder)
    index = read_index(plan.folder)
    skipped = check_same(plan, index, skip_bad)
    damaged, done = [], 0
    intact = in_threads(lambda shard: has_digest(workspace.shard(shard.file), shard), index.shards, workers)
    for i, (shard, same) in enumerate(zip(index.shards, intact, strict=True)):
        damaged += [] if same else [f"{workspace.shard(shard.file)}: its bytes differ from the index"]
        done += int((index.shard == i).sum())
        report(done)
    if damaged:
        head = f"{plan.folder}: expected intact shards, got damaged ones (see prep verify --repair, or --overwrite):"
        raise ShardsError("\n  ".join([head, *damaged]))
    if index.made_by != MADE_BY:
        note(one_line(f"{plan.folder}: made by {index.made_by[:200]}; this is {MADE_BY}"))
    return index, skipped


def check_same(plan: DatasetPlan, index: Index, skip_bad: bool) -> list[SkippedImage]:
    """Check that a dataset is what a plan makes; return the images skipped when it was built.

    Raises:
        ShardsError: it differs; or images were skipped, which `skip_bad` does not allow.
    """
    skipped = Workspace(plan.folder).read_skipped()
    if not skip_bad and not differences(plan.manifest, manifest_of_index(index, [], plan), versions=False):
        return []
    if lines := differences(plan.manifest, manifest_of_index(index, skipped, plan), versions=False):
        head = f"{plan.folder}: expected the dataset that this command makes, got another (--overwrite replaces it):"
        raise ShardsError("\n  ".join([head, *map(one_line, lines)]))
    if not skip_bad:
        head = (
            f"{plan.folder}: expected a dataset of all images, got one without {len(skipped)} skipped images "
            "(--retry-skipped retries them, --on-error skip accepts this, --overwrite rebuilds everything):"
        )
        raise ShardsError("\n  ".join([head, *describe_skipped(plan, skipped)]))
    return skipped


def describe_skipped(plan: DatasetPlan, skipped: Sequence[SkippedImage]) -> list[str]:
    """Return a line for each skipped image, with the path of its file."""
    paths = {(source.name, file.name): shown(file.path) for source in plan.sources for file in source.files.values()}
    return [one_line(f"{paths.get((image.image, image.source), image.source)}: {image.reason}") for image in skipped]


def manifest_of_index(index: Index, skipped: Sequence[SkippedImage], plan: DatasetPlan) -> Manifest:
    """Return the manifest of a complete dataset; `plan` tells the files of skipped images."""
    planned = {source.name: source for source in plan.sources}
    gone = [planned[image.image] for image in skipped if image.image in planned]
    lost = [image.source for image in skipped if image.image not in planned]
    sources = {}
    for level, plane in index.planes.items():
        if plane.source is not None:
            names = [*plane.source, *(source.files.get(level, source.image).name for source in gone)]
            sources[plane_name(level)] = [*names, *(lost if level == HR else [])]
    return Manifest(
        made_by=index.made_by,
        libraries=dict(index.libraries),
        container=index.container,
        scales=list(index.scales),
        tile=index.planes[HR].tile,
        images_per_shard=index.images_per_shard,
        lr=lr_text(index.lr),
        sources=sources,
    )
