"""The modes warm, cold and slow: preparing files before a way reads them, and rounds in which all ways take turns."""

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from children import Child, Order, Reading, child
from crops import Ints, Task, disjoint, images_in, touched
from reading import Way
from storage import files_in, fio_seconds, forget, mounted, remember
from ways_ours import LOADER_AUTO

from loader import PatchDataset
from loader.pixels.byte_ranges import Ranges, concatenated, cut, merged
from loader.system.filesystem import advice_limit

Rounds = dict[str, list[Reading]]  # by way
LIMIT = "fio"
LATENCY = "requests × delay ÷ in flight"
LIMITS = {
    LIMIT: "the limit: fio in direct mode, 32 requests in flight, replays the very requests that PatchLoader makes; "
    "the better of two runs right after it",
    LATENCY: "the limit, computed: the requests that PatchLoader made, each delayed, so many in flight",
}
WARM_SAMPLES = 2560
IN_FLIGHT = 32


@dataclass(frozen=True)
class Settings:
    """How to measure: rounds, seconds per way and round, samples for cold and slow storage, and the slow mount."""

    rounds: int
    seconds: float
    samples: int
    lr_patch: int
    batch_size: int
    mount: str
    unmount: str
    delay_ms: float
    in_flight: int

    def task(self, folder: Path, scale: int, numbers: Ints, cores: tuple[int, ...] | None = None) -> Task:
        """Return the crops to read at one scale."""
        return Task(folder, scale, self.lr_patch, self.batch_size, numbers, cores)


def warm(ways: list[Way], work: Path, scale: int, settings: Settings, say: Callable[[str], None]) -> Rounds:
    """Measure with all files in the page cache, on one core, except for ways that use all cores."""
    core = (max(os.sched_getaffinity(0)),)
    for folder in sorted({way.folder for way in ways}):
        remember(files_in(work / folder))
    task = settings.task(work, scale, np.arange(WARM_SAMPLES), core)
    done: Rounds = {way.name: [] for way in ways}
    with ExitStack() as stack:
        children: dict[str, Child] = {}
        for key in dict.fromkeys(way.process or way.name for way in ways):
            some = [way for way in ways if key in (way.process, way.name)]
            its_task = replace(task, cores=None) if some[0].all_cores else task
            children[key] = stack.enter_context(child("warm", some, its_task))
        say("warming up")
        for way in ways:  # maps every page, and compiles code compiled at first use
            children[way.process or way.name].read(Order(way.name, 2.0, endless=False))
        for number in range(settings.rounds):
            say(f"round {number + 1} of {settings.rounds}")
            for way in ways:
                order = Order(way.name, settings.seconds, endless=True)
                done[way.name].append(children[way.process or way.name].read(order))
    return done


def cold(ways: list[Way], work: Path, scale: int, settings: Settings, say: Callable[[str], None]) -> Rounds:
    """Measure with an empty page cache and a new process for each way and round; crops share no pages.

    PatchLoader reads all samples, so that everything requested is used; other ways visit each image at most once.
    """
    task = pick(work, scale, settings)
    say(f"{len(task.numbers)} crops that share no pages")
    data = task.dataset()
    requests, files = asked(data, settings.batch_size), [shard.file for shard in data.shards.index.shards]
    fio = [LIMIT] if shutil.which("fio") and LOADER_AUTO in ways else []
    done: Rounds = {name: [] for name in (*fio, *(way.name for way in ways))}
    for number in range(settings.rounds):
        say(f"round {number + 1} of {settings.rounds}")
        for way in ways:
            files_of_way = files_in(work / way.folder)
            forget(files_of_way)
            with child("cold", [way], task) as process:
                forget(files_of_way)  # again, for pages read when opening
                done[way.name].append(process.read(order_of(way, task, settings)))
            if fio and way.name == LOADER_AUTO.name:
                # Right after ours, and again: disks with burst credits are judged by the better of the two.
                seconds = min(fio_seconds(work / "shards", files, requests, IN_FLIGHT) for _ in range(2))
                done[LIMIT].append(Reading(len(task.numbers), seconds, 0, requests.bytes, len(requests)))
    return done


def slow(ways: list[Way], work: Path, scale: int, settings: Settings, say: Callable[[str], None]) -> Rounds:
    """Measure on a mount that delays each request, mounted anew for each way and round."""
    task = pick(work, scale, settings)
    done: Rounds = {way.name: [] for way in ways}
    for number in range(settings.rounds):
        say(f"round {number + 1} of {settings.rounds}")
        for way in ways:
            with mounted(work, settings.mount, settings.unmount) as place:
                with child("slow", [way], replace(task, folder=place.folder)) as process:
                    before = place.requests()
                    reading = process.read(order_of(way, task, settings))
                after = place.requests()
            counted = replace(reading, requests=after[0] - before[0], bytes_read=after[1] - before[1])
            done[way.name].append(counted)
    for ours in done.get(LOADER_AUTO.name, ()):
        least = ours.requests * settings.delay_ms / 1e3 / settings.in_flight
        done.setdefault(LATENCY, []).append(replace(ours, seconds=least, cpu_seconds=0))
    return done


def pick(work: Path, scale: int, settings: Settings) -> Task:
    """Return crops that share no pages, as many as requested or available."""
    whole = PatchDataset(work / "shards", scale, settings.lr_patch, augment=False, too_small="skip", fixed=True)
    task = settings.task(work, scale, disjoint(whole, settings.samples))
    return replace(task, in_flight=IN_FLIGHT)


def asked(data: PatchDataset, batch_size: int) -> Ranges:
    """Return the requests that PatchLoader makes on a local disk, in its order: by batch, adjacent ones merged."""
    limit = advice_limit(data.shards.folder)
    batches = []
    for first in range(0, len(data), batch_size):
        crops = data.plan.crops(0, np.arange(first, min(first + batch_size, len(data))))
        batches.append(cut(merged(touched(data, crops)), limit))
    return concatenated(batches)


def order_of(way: Way, task: Task, settings: Settings) -> Order:
    """Return the order to read: all samples for PatchLoader, which reads ahead; each image once for other ways."""
    if way.name.startswith(LOADER_AUTO.name):
        return Order(way.name, float("inf"), endless=False)
    return Order(way.name, settings.seconds, endless=False, most=images_in(task))
