"""PatchLoader as a state machine: random sequences of creating, iterating, dropping, saving and loading."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import build, photograph, write_image
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from torch import Tensor

from loader import PatchDataset, PatchIterator, PatchLoader, ShardsError

FOLDER, EXAMPLES = "SRSHARDS_TEST_FOLDER", "SRSHARDS_TEST_EXAMPLES"
LENGTH, BATCHES = 12, 5  # samples per epoch; most batches per advance
WAYS = st.sampled_from(["mmap", "pread"])


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("srshards")]


class Tracked:
    """An iterator, and the sample that it must return next."""

    def __init__(self, loader: PatchLoader, sample: int) -> None:
        self.loader, self.stream, self.sample = loader, iter(loader), sample
        self.closed = False


class Cycle:
    def __init__(self, stream: PatchIterator) -> None:
        self.stream, self.hook = stream, self.log

    def log(self) -> None: ...


class Machine(RuleBasedStateMachine):
    loaders: Bundle[PatchLoader] = Bundle("loaders")
    streams: Bundle[Tracked] = Bundle("streams")
    states: Bundle[dict[str, Any]] = Bundle("states")

    @initialize()
    def begin(self) -> None:
        self.data = PatchDataset(os.environ[FOLDER], 2, 8, length=LENGTH, seed=5)
        self.pixels: dict[int, tuple[Tensor, Tensor]] = {}
        self.positions: dict[int, int] = {}  # by loader: where its next iterator starts
        self.newest: dict[int, Tracked | None] = {}
        self.kept: list[PatchLoader] = []  # keeps their ids unique

    def wanted(self, sample: int) -> tuple[Tensor, Tensor]:
        if sample not in self.pixels:
            epoch, n = divmod(sample, LENGTH)
            self.data.set_epoch(epoch)
            self.pixels[sample] = self.data[n]
            self.data.set_epoch(0)
        return self.pixels[sample]

    @rule(
        target=loaders, io=WAYS, batch_size=st.integers(1, 5), start=st.integers(0, 30), threads=st.integers(1, 3),
        readahead=st.integers(0, 4), drop_pages=st.booleans(),
    )  # fmt: skip
    def make(self, start: int, **options: Any) -> PatchLoader:
        loader = PatchLoader(self.data, start=start, **options)
        self.positions[id(loader)], self.newest[id(loader)] = start, None
        self.kept.append(loader)
        return loader

    @rule(target=streams, loader=loaders)
    def iterate(self, loader: PatchLoader) -> Any:
        if len(ours()) > 60:
            return multiple()
        tracked = Tracked(loader, self.positions[id(loader)])
        self.newest[id(loader)] = tracked
        return tracked

    @rule(tracked=streams, count=st.integers(1, BATCHES))
    def advance(self, tracked: Tracked, count: int) -> None:
        for _ in range(count):
            batch = next(tracked.stream, None)
            if tracked.closed:
                assert batch is None
                return
            assert batch is not None
            assert len(batch[0]) == tracked.loader.batch_size
            for found in zip(*batch, strict=True):
                assert all((a == b).all() for a, b in zip(found, self.wanted(tracked.sample), strict=True))
                tracked.sample += 1
            assert tracked.stream.state_dict()["sample"] == tracked.sample

    @rule(tracked=streams)
    def close(self, tracked: Tracked) -> None:
        tracked.stream.close()
        tracked.closed = True

    @rule(tracked=consumes(streams), how=st.sampled_from(["count", "cycle", "exception", "frame", "another thread"]))
    def drop(self, tracked: Tracked, how: str) -> None:
        stream = tracked.stream
        del tracked.stream
        if how == "cycle":
            Cycle(stream)
        elif how == "exception":
            self.retry(stream)
            tracked.sample += 0 if tracked.closed else tracked.loader.batch_size  # of the batch at which it failed
        elif how == "frame":
            cell: list[Any] = [stream]
            cell.append(lambda: cell)
        elif how == "another thread":
            cell = [stream]
            thread = threading.Thread(target=cell.clear)
            del stream
            thread.start()
            thread.join()

    def retry(self, stream: PatchIterator) -> None:
        try:
            for _ in stream:
                raise MemoryError
        except MemoryError as error:
            kept = error  # noqa: F841  a reference cycle with this frame

    @rule()
    def collect(self) -> None:
        gc.collect()

    @rule(target=states, loader=loaders)
    def save(self, loader: PatchLoader) -> dict[str, Any]:
        newest = self.newest[id(loader)]
        state = loader.state_dict()
        assert state["sample"] == (self.positions[id(loader)] if newest is None else newest.sample)
        return state

    @rule(target=states, tracked=streams)
    def save_iterator(self, tracked: Tracked) -> dict[str, Any]:
        state = tracked.stream.state_dict()
        assert state["sample"] == tracked.sample
        return state

    @rule(loader=loaders, state=states)
    def load(self, loader: PatchLoader, state: dict[str, Any]) -> None:
        loader.load_state_dict(state)
        self.positions[id(loader)], self.newest[id(loader)] = state["sample"], None

    @rule(loader=loaders, state=states, key=st.sampled_from(["seed", "length", "datasets", "sample"]))
    def load_another(self, loader: PatchLoader, state: dict[str, Any], key: str) -> None:
        before = loader.state_dict()
        with pytest.raises(ShardsError):
            loader.load_state_dict(state | {key: {"datasets": ["0" * 64], "sample": -1}.get(key, 77)})
        assert loader.state_dict() == before

    @rule(loader=loaders, tracked=streams)
    def fork(self, loader: PatchLoader, tracked: Tracked) -> None:
        pid = os.fork()
        if not pid:
            signal.alarm(60)  # dump the stacks of all threads
            code = 1
            try:
                (lr, _hr), _ = zip(*(next(stream) for stream in [iter(loader)] * 2), strict=True)
                del tracked.stream
                gc.collect()
                code = 0 if len(lr) == loader.batch_size else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    @invariant()
    def several_collections(self) -> None:
        gc.collect(0)

    def teardown(self) -> None:
        if hasattr(self, "newest"):
            self.newest.clear()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    for name in "ab":
        write_image(folder / "in" / f"{name}.png", photograph(48, 48, ord(name)))
    return build(folder / "in", folder / "out", scales=(2,), images_per_shard=1, container="raw")


def run_machine(folder: Path, examples: int, limit: int) -> None:
    """Run the machine in its own process; if it hangs, that dumps the stacks of all threads and ends."""
    environment = os.environ | {FOLDER: str(folder), EXAMPLES: str(examples), "LIMIT": str(limit)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", __file__],
        capture_output=True, text=True, timeout=limit + 60, check=False, env=environment, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


def test_random_use(small: Path) -> None:
    run_machine(small, 5, 300)


@pytest.mark.long
def test_long_random_use(small: Path) -> None:
    run_machine(small, 100, 600)


def main() -> None:
    import faulthandler

    from hypothesis.stateful import run_state_machine_as_test

    faulthandler.register(signal.SIGALRM, chain=True)
    signal.alarm(int(os.environ["LIMIT"]))
    checks = list(HealthCheck)
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=int(os.environ[EXAMPLES]),
            stateful_step_count=30,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # shrinking takes hours with threads
            suppress_health_check=checks,
        ),
    )
    gc.collect()
    for _ in range(3000):
        if not [name for name in ours() if name != "srshards-read"]:
            return
        time.sleep(0.02)
    raise AssertionError(ours())


if __name__ == "__main__":
    main()
