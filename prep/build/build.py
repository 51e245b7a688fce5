"""Images → shards → index. Which image goes into which shard is known first; shards are built apart; the index is last.

The bytes of a shard depend only on its sources and the recipe, not on the workers or their order. So an interrupted
build resumes from its finished shards, and ends with the same bytes as an undisturbed one.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from loader.errors import ShardsError, one_line
from loader.format.index import read_index
from loader.format.layout import Index
from loader.system.threads import in_threads
from prep.build.check import check_dataset, check_same, describe_skipped
from prep.build.pool import SHORT, build_shards
from prep.build.resources import affordable_workers
from prep.build.retry import reopen
from prep.plan.dataset import DatasetPlan, ShardPlan
from prep.plan.manifest import Manifest, differences
from prep.shard.records import ShardRecord, SkippedImage
from prep.workspace.indexing import make_index
from prep.workspace.state import Complete, Orphaned, Other, Unfinished
from prep.workspace.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A complete dataset: its index and its skipped images; `checked` if it was not built, but found and checked."""

    index: Index
    skipped: list[SkippedImage]
    checked: bool

    @property
    def bytes(self) -> int:
        """The bytes of all shards."""
        return sum(shard.bytes for shard in self.index.shards)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What to build, where, and how; see `build_dataset`."""

    plan: DatasetPlan
    workspace: Workspace
    workers: int
    skip_bad: bool
    report: Callable[[int], None]
    note: Callable[[str], None]


def build_dataset(
    plan: DatasetPlan,
    workers: int,
    *,
    skip_bad: bool,
    overwrite: bool,
    report: Callable[[int], None],
    note: Callable[[str], None] = lambda text: None,
    retry: bool = False,
) -> Summary:
    """Build the dataset of a plan, or resume its build; if it is complete already, check it.

    Args:
        plan: as returned by `plan_dataset`.
        workers: processes that build shards; fewer if memory is short.
        skip_bad: skip images that cannot be used, and list them in skipped.json.
        overwrite: replace any dataset in the folder, once the new one is complete, and any other unfinished build.
        report: called with the number of images done.
        note: called with messages for the user.
        retry: retry the images skipped before; skip those that still cannot be used.

    Raises:
        StorageError: the storage of the sources fails; no image is skipped for that.
        ShardsError: the folder holds something else, or another build uses it; images cannot be used; space or memory
            is short; the folder cannot be written. An earlier dataset is unchanged, and finished shards are kept for
            the next build of the plan. Without any, nothing is left behind.
    """
    folder, workspace = plan.folder, Workspace(plan.folder)
    job = _Job(plan=plan, workspace=workspace, workers=workers, skip_bad=skip_bad or retry, report=report, note=note)
    try:
        if workspace.is_settled() and not overwrite and not retry:
            return _check(job)  # without the lock: needs no right to write
        with workspace.created(), workspace.locked(note):
            if others := workspace.other_writers():
                note(f"{folder}: can also be written by {others}: files in it may be theirs (see SECURITY.md)")
            match workspace.state(plan.manifest):
                case Unfinished():
                    return _resume(job, retry)
                case Complete(other_build) if not overwrite:
                    if retry and (skipped := workspace.read_skipped()):
                        return _retry(job, skipped, other_build)
                    if other_build:
                        note(f"{folder}: there is also an unfinished build of another dataset")
                    else:
                        workspace.abandon()
                    return _check(job)
                case Other(manifest) if not overwrite:
                    raise _refusal(plan, workspace, manifest)
                case Orphaned(file) if not overwrite:
                    got = f"{file} without {workspace.index.name} (--overwrite replaces it)"
                    raise ShardsError(f"{folder}: expected a folder without shards, got {got}")
                case _:
                    workspace.abandon()
                    return _resume(job)
    except OSError as error:
        raise ShardsError(_unwritable(workspace, error)) from None


def _check(job: _Job) -> Summary:
    index, skipped = check_dataset(job.plan, job.workers, job.skip_bad, job.report, job.note)
    return Summary(index=index, skipped=skipped, checked=True)


def _retry(job: _Job, before: list[SkippedImage], other_build: bool) -> Summary:
    """Rebuild the shards of a complete dataset that have skipped images."""
    folder = job.plan.folder
    if other_build:
        raise ShardsError(f"{folder}: expected no build but this dataset's, got an unfinished one of another dataset")
    index = read_index(folder)
    check_same(job.plan, index, skip_bad=True)
    job.workspace.clean()
    reopen(job.plan, index, before)
    summary = _resume(job)
    used = len({image.image for image in before} - {image.image for image in summary.skipped})
    job.note(
        f"{folder}: {used} of {len(before)} images skipped before are usable now"
        if used
        else f"{folder}: the {len(before)} images skipped before are still unusable; nothing has changed"
    )
    return summary


def _refusal(plan: DatasetPlan, workspace: Workspace, found: Manifest | None) -> ShardsError:
    """Return the error for an unfinished build of another plan."""
    damaged = [f"{workspace.manifest.name}: damaged, or of a far larger dataset"]
    lines = differences(plan.manifest, found, versions=True) if found else damaged
    head = f"{plan.folder}: expected an unfinished build of this dataset, got one of another (--overwrite starts over):"
    return ShardsError("\n  ".join([head, *map(one_line, lines)]))


def _resume(job: _Job, retry: bool = False) -> Summary:
    """Build the shards that are not finished, and commit the dataset; `retry`: rebuild shards with skipped images."""
    plan, workspace = job.plan, job.workspace
    records: dict[str, ShardRecord] = {}  # by file
    bad: list[SkippedImage] = []

    def done() -> int:
        return sum(len(shard.sources) for shard in plan.shards if shard.file in records)

    def finished(shard: ShardPlan, record: ShardRecord) -> None:
        if record.skipped and not job.skip_bad:
            bad.extend(record.skipped)
        elif record.covers(shard):  # it was built to the end
            workspace.keep(plan, shard, record)
            records[shard.file] = record

    found = in_threads(lambda shard: workspace.find(plan, shard), plan.shards, job.workers)
    for shard, record in zip(plan.shards, found, strict=True):
        if record and (not record.skipped or (job.skip_bad and not retry)):
            records[shard.file] = record
            job.report(done())
    with _cleaning_up(job, records):
        workspace.clean(records)
        workspace.begin(plan.manifest)
        rest = [shard for shard in plan.shards if shard.file not in records]
        if records:
            job.note(
                f"{plan.folder}: {len(records)} of {len(plan.shards)} shards are already finished; all checksums match"
            )
        if rest:
            before, workers = done(), affordable_workers(plan, rest, job.workers, job.note)
            build_shards(plan, rest, workers, job.skip_bad, lambda more: job.report(before + more), finished, job.note)
        if bad:
            head = "expected usable images, got these (--on-error skip continues without them):"
            lines = describe_skipped(plan, sorted(bad, key=lambda image: image.image))
            raise ShardsError("\n  ".join([head, *lines]))
        made = [records[shard.file] for shard in plan.shards]
        index, skipped = make_index(plan.recipe, made), [image for record in made for image in record.skipped]
        workspace.commit(index, skipped)
    return Summary(index=index, skipped=skipped, checked=False)


@contextlib.contextmanager
def _cleaning_up(job: _Job, records: Mapping[str, ShardRecord]) -> Iterator[None]:
    """Clean up after an interrupted build: keep recorded shards, remove everything else."""
    try:
        yield
    except BaseException as error:
        if not any(record.shard for record in records.values()):
            with contextlib.suppress(OSError):
                job.workspace.abandon()
            raise
        with contextlib.suppress(OSError):
            job.workspace.clean(records)
        state = f"{len(records)} of {len(job.plan.shards)} shards are finished; run the same command to resume"
        if isinstance(error, OSError | ShardsError | MemoryError):
            text = _unwritable(job.workspace, error) if isinstance(error, OSError) else str(error) or SHORT
            raise ShardsError(f"{text}\n{state}") from None
        job.note(state)
        raise


def _unwritable(workspace: Workspace, error: OSError) -> str:
    return f"{error.filename or workspace.folder}: could not be written: {error.strerror or error}"
