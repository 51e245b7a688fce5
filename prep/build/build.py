"""Images → shards → index: which image goes where, known before any is read; then shards, built apart; the index last.

Which bytes a shard holds follows from the sources and the recipe alone, not from the workers or their order. So a build
that was stopped goes on from the shards in its journal, and ends as if there had been no stop.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loader.errors import ShardsError, one_line
from loader.format import layout as fmt
from loader.format.index import read_index
from loader.format.layout import Index
from loader.system.threads import in_threads
from prep.build.affordable import affordable_workers
from prep.build.commit import commit
from prep.build.indexing import make_index
from prep.build.journal import Journal, clean, discard, holds, leftovers, read_terms
from prep.build.lock import LOCK, locked
from prep.build.pool import SHORT, build_shards
from prep.build.retry import reopen
from prep.build.skipped import read_skipped
from prep.build.staging import BUILD, SHARD, exists
from prep.build.terms import MADE_BY, Terms, differences, terms_of, terms_of_index
from prep.build.trust import others_who_can_write
from prep.images.faults import shown
from prep.images.find import ImageFile
from prep.images.pair import check_sizes, pair_lr
from prep.shard.shard import Bad, Recipe, ShardPlan, ShardRecord, Source

Report = Callable[[int], None]
Note = Callable[[str], None]


def images_per_shard(count: int) -> int:
    """The default: 16 shards, for as many cores to build at once, of 8 to 64 images."""
    return min(max(-(-count // 16), 8), 64)


def plan_shards(
    images: Sequence[ImageFile], recipe: Recipe, folder: Path, lr: Path | None = None, note: Note = lambda text: None
) -> list[ShardPlan]:
    """Lay out a dataset: images in order, so many to a shard.

    Args:
        images: as `find_images` gives them.
        recipe: how they are to be stored.
        folder: the dataset's folder to be.
        lr: a folder of LR images to pack in place of making them.
        note: is told of LR images that are reached through links.

    Raises:
        ShardsError: listing each LR image that is missing, left over, or of a size that does not fit.
    """
    given = {scale: pair_lr(images, lr, scale, note) for scale in recipe.scales} if lr else {}
    for scale, files in given.items():
        check_sizes(images, files, scale)
    sources = [Source(image, {scale: files[i] for scale, files in given.items()}) for i, image in enumerate(images)]
    step = recipe.images_per_shard
    return [
        ShardPlan(number, tuple(sources[start : start + step]), recipe, folder)
        for number, start in enumerate(range(0, len(sources), step))
    ]


@dataclass(frozen=True)
class Summary:
    """A complete dataset: its index, the bytes of its shards, the images that had to be left out.

    `checked`: it was there already, and was not built but checked.
    """

    index: Index
    bytes: int
    bad: list[Bad]
    checked: bool = False


def build_dataset(
    plans: Sequence[ShardPlan],
    workers: int,
    *,
    skip_bad: bool,
    overwrite: bool,
    report: Report,
    note: Note = lambda text: None,
    retry: bool = False,
) -> Summary:
    """Build the shards of a plan and make a dataset of them, or go on with that; check it if it is there already.

    Args:
        plans: as `plan_shards` gives them.
        workers: processes that build shards; fewer where memory is short.
        skip_bad: leave out images that cannot be used (and write which, and why, to skipped.json).
        overwrite: replace whatever dataset the folder holds, once the new one is complete; and other beginnings.
        report: is told now and then how many images are done.
        note: is told, in words, what a user may want to know on the way.
        retry: try images again that were left out before; those that are still bad are left out again.

    Raises:
        StorageError: the storage of the sources fails: no image is left out for that.
        ShardsError: the folder holds something else, or another build is at work there; images cannot be used; space or
            memory is short; the folder cannot be written. An earlier dataset is as it was, finished shards are kept
            for the next build of the plan; if there are none, nothing is left behind.
    """
    folder, terms = plans[0].folder, terms_of(plans)
    journal, skip_bad = Journal(folder, terms), skip_bad or retry

    def stands() -> bool:
        return not overwrite and (folder / fmt.INDEX).exists()

    try:
        if stands() and not retry and not leftovers(folder) and not (folder / LOCK).exists():
            return check_dataset(plans, workers, skip_bad, report, note)  # needs no right to write
        with _made(folder), locked(folder, note):
            if who := others_who_can_write(folder):
                note(f"{folder}: can be written by {who}, too: what is found there may be theirs (see SECURITY.md)")
            if read_terms(folder, terms) != terms:
                if stands():
                    if retry and (before := read_skipped(folder)):
                        return _try_again(journal, plans, before, workers, report, note)
                    if exists(folder / BUILD):
                        note(f"{folder}: beside the dataset there is an unfinished build of another")
                    else:
                        clean(folder)
                    return check_dataset(plans, workers, skip_bad, report, note)
                _refuse_another(folder, terms, overwrite)
                discard(folder)
            return _go_on(journal, plans, workers, skip_bad, report, note, retry)
    except OSError as error:
        raise ShardsError(_unwritable(folder, error)) from None


def check_dataset(plans: Sequence[ShardPlan], workers: int, skip_bad: bool, report: Report, note: Note) -> Summary:
    """Hold that the dataset in the folder of a plan is what the plan makes, and that its shards are unharmed.

    The pixels of the sources are not looked at, their names are.

    Raises:
        ShardsError: it is not; listing in what it differs, or which shards are damaged.
    """
    folder = plans[0].folder
    index = read_index(folder)
    skipped = _need_same(plans, index, skip_bad)
    damaged, done = [], 0
    unharmed = in_threads(lambda shard: holds(folder / shard.file, shard), index.shards, workers)
    for i, whole in enumerate(unharmed):
        damaged += [] if whole else [f"{folder / index.shards[i].file}: other bytes than the index records"]
        done += int((index.shard == i).sum())
        report(done)
    if damaged:
        head = f"{folder}: expected unharmed shards, got these damaged (prep verify --repair, or --overwrite):"
        raise ShardsError("\n  ".join([head, *damaged]))
    if index.made_by != MADE_BY:
        note(one_line(f"{folder}: made by {index.made_by[:200]}; this is {MADE_BY}"))
    return Summary(index, sum(shard.bytes for shard in index.shards), skipped, checked=True)


def _need_same(plans: Sequence[ShardPlan], index: Index, skip_bad: bool) -> list[Bad]:
    """Hold that a dataset is what a plan makes; return the images that were left out of it."""
    folder, terms = plans[0].folder, terms_of(plans)
    skipped = read_skipped(folder)
    if not skip_bad and not differences(terms, terms_of_index(index, [], plans), versions=False):
        return []
    if lines := differences(terms, terms_of_index(index, skipped, plans), versions=False):
        head = f"{folder}: expected the dataset that this command makes, got another (--overwrite replaces it):"
        raise ShardsError("\n  ".join([head, *map(one_line, lines)]))
    if not skip_bad:
        head = (
            f"{folder}: expected a dataset of all images, got one that lacks {len(skipped)}, left out before "
            "(--retry-skipped tries them again, --on-error skip accepts that, --overwrite builds all anew):"
        )
        raise ShardsError("\n  ".join([head, *describe_bad(plans, skipped)]))
    return skipped


def _try_again(
    journal: Journal, plans: Sequence[ShardPlan], before: Sequence[Bad], workers: int, report: Report, note: Note
) -> Summary:
    """Build those shards of a complete dataset again from which images were left out."""
    folder = journal.folder
    if (folder / BUILD).exists():
        raise ShardsError(f"{folder}: expected a complete dataset alone, got an unfinished build of another beside it")
    index = read_index(folder)
    _need_same(plans, index, skip_bad=True)
    clean(folder)
    reopen(journal, plans, index, before)
    summary = _go_on(journal, plans, workers, True, report, note)
    taken = len({bad.image for bad in before} - {bad.image for bad in summary.bad})
    note(
        f"{folder}: {taken} of {len(before)} images that were left out before could be used now"
        if taken
        else f"{folder}: the {len(before)} images that were left out before are still bad: nothing has changed"
    )
    return summary


def _refuse_another(folder: Path, terms: Terms, overwrite: bool) -> None:
    """Hold that no work of others is in the way of a new build."""
    if overwrite:
        return
    if exists(folder / BUILD):
        found = read_terms(folder, terms)
        lines = differences(terms, found, versions=True) if found else [f"{BUILD}: damaged, or of far more images"]
        head = f"{folder}: expected an unfinished build by this command, got another's (--overwrite starts anew):"
        raise ShardsError("\n  ".join([head, *map(one_line, lines)]))
    if shards := [path.name for path in folder.iterdir() if SHARD.fullmatch(path.name)]:
        got = f"{min(shards)} without {fmt.INDEX}"
        raise ShardsError(f"{folder}: expected a folder without shards, got {got} (--overwrite replaces what is there)")


def _go_on(
    journal: Journal,
    plans: Sequence[ShardPlan],
    workers: int,
    skip_bad: bool,
    report: Report,
    note: Note,
    retry: bool = False,
) -> Summary:
    """Build what the journal does not know yet, and make a dataset of it all; with `retry`, what it knows bad, too."""
    folder, recipe = journal.folder, plans[0].recipe
    records: dict[str, ShardRecord] = {}  # by the shard's file
    bad: list[Bad] = []

    def done() -> int:
        return sum(len(plan.sources) for plan in plans if plan.file in records)

    def finished(plan: ShardPlan, record: ShardRecord) -> None:
        if record.bad and not skip_bad:
            bad.extend(record.bad)
        elif record.covers(plan):  # it was not stopped
            journal.keep(plan, record)
            records[plan.file] = record

    for plan, record in zip(plans, in_threads(journal.find, plans, workers), strict=True):
        if record and (not record.bad or (skip_bad and not retry)):
            records[plan.file] = record
            report(done())
    with _resumable(folder, records, len(plans), note):
        clean(folder, records)
        journal.begin()
        rest = [plan for plan in plans if plan.file not in records]
        if records:
            note(f"{folder}: {len(records)} of {len(plans)} shards were finished before, and are unharmed")
        if rest:
            workers = affordable_workers(rest, workers, note)
            before = done()
            build_shards(rest, workers, skip_bad, lambda more: report(before + more), finished, note)
        if bad:
            head = "expected usable images, got these (--on-error skip goes on):"
            raise ShardsError("\n  ".join([head, *describe_bad(plans, sorted(bad, key=lambda entry: entry.image))]))
        made = [records[plan.file] for plan in plans]
        index, left_out = make_index(recipe, made), [entry for record in made for entry in record.bad]
        commit(folder, index, left_out)
        discard(folder)
    return Summary(index, sum(shard.bytes for shard in index.shards), left_out)


@contextlib.contextmanager
def _resumable(folder: Path, records: Mapping[str, ShardRecord], count: int, note: Note) -> Iterator[None]:
    """Whatever ends the build before its time: the shards with records stay, if there are some, and nothing else."""
    try:
        yield
    except BaseException as error:
        if not any(record.shard for record in records.values()):
            with contextlib.suppress(OSError):
                discard(folder)
            raise
        with contextlib.suppress(OSError):
            clean(folder, records)
        state = f"{len(records)} of {count} shards are finished; the same command goes on from there"
        if isinstance(error, OSError | ShardsError | MemoryError):
            text = _unwritable(folder, error) if isinstance(error, OSError) else str(error) or SHORT
            raise ShardsError(f"{text}\n{state}") from None
        note(state)
        raise


def describe_bad(plans: Sequence[ShardPlan], bad: Sequence[Bad]) -> list[str]:
    """A line for each image that could not be used, with the path of the file."""
    paths = {
        (source.image.stem, file.name): shown(file.path)
        for plan in plans
        for source in plan.sources
        for file in source.files
    }
    return [one_line(f"{paths.get((entry.image, entry.source), entry.source)}: {entry.reason}") for entry in bad]


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A folder that is there; and, if it was not before, is not afterwards if nothing is in it."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _unwritable(folder: Path, error: OSError) -> str:
    return f"{error.filename or folder}: could not be written: {error.strerror or error}"
