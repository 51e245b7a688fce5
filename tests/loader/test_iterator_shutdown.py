"""Iterators shut down however they are dropped: by the garbage collector, an exception, a fork, interpreter exit."""

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import build, photograph, write_image

WAYS = ["mmap", "pread"]
LONG = pytest.mark.long
SOME = [pytest.param("mmap", marks=LONG), "pread"]  # the one with more threads always runs
# A program that hangs dumps the stacks of all threads and is killed.
PREAMBLE = """
import faulthandler, gc, os, signal, sys, threading, time, warnings
from itertools import islice
faulthandler.register(signal.SIGALRM, chain=True)  # faulthandler's own timer would keep forked children alive
signal.alarm({limit})
from loader import PatchDataset, PatchLoader, ShardsError
data = PatchDataset({folder!r}, 2, 8, length=40)
def loader(**options):
    return PatchLoader(data, **({{"batch_size": 2, "io": {io!r}, "threads": 2, "readahead": 2}} | options))
def ours():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("srshards")]
def all_ended():
    for _ in range(3000):
        if not ours():
            return True
        time.sleep(0.02)
def descriptors():
    return len(os.listdir("/proc/self/fd"))
def child_ends(pid):
    for _ in range(3000):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, 9)
    return "hangs"
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset."""
    folder = tmp_path_factory.mktemp("small")
    for name in "abc":
        write_image(folder / "in" / f"{name}.png", photograph(48, 48, ord(name)))
    return build(folder / "in", folder / "out", scales=(2,), images_per_shard=1, container="raw")


def run(folder: Path, io: str, code: str, limit: int = 150) -> subprocess.CompletedProcess[str]:
    """Run a program that uses iterators; it must exit with code 0 and print no errors."""
    text = PREAMBLE.format(folder=str(folder), io=io, limit=limit) + textwrap.dedent(code)
    command = [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit + 60, check=False)
    assert done.returncode == 0, done.stderr[-8000:]
    assert done.stderr == ""
    return done


CYCLES = """
class Trainer:
    def __init__(self):
        self.stream = iter(loader())
        self.hook = self.log
        next(self.stream)
    def log(self): ...

def retried():
    try:
        for batch in loader():
            raise MemoryError
    except MemoryError as error:
        kept = error

gc.set_threshold(40)  # collect often, also while threads start and batches are requested
for n in range({count}):
    if n % 2: retried()
    else: Trainer()
gc.collect()
assert all_ended(), ours()
assert descriptors() < 40, descriptors()
print(len(next(iter(loader()))))
"""


@pytest.mark.parametrize("io", WAYS)
def test_garbage_collected_iterators(small: Path, io: str) -> None:
    assert run(small, io, CYCLES.format(count=120)).stdout == "2\n"


@pytest.mark.long
@pytest.mark.parametrize("io", WAYS)
def test_thousands_of_garbage_collected_iterators(small: Path, io: str) -> None:
    assert run(small, io, CYCLES.format(count=5000), limit=1500).stdout == "2\n"


@pytest.mark.long
@pytest.mark.parametrize("io", WAYS)
def test_finaliser_closes_an_iterator(small: Path, io: str) -> None:
    """Frameworks close what they own in `__del__`; the collector may run it in any thread, including ours."""
    code = """
    class Trainer:
        def __init__(self):
            self.stream = iter(loader())
            self.me = self
            next(self.stream)
        def __del__(self):
            self.stream.close()

    gc.set_threshold(40)
    for n in range(60):
        Trainer()
    gc.collect()
    assert all_ended(), ours()
    """
    run(small, io, code)


@pytest.mark.long
@pytest.mark.parametrize("io", WAYS)
def test_dataset_referring_to_its_iterator(small: Path, io: str) -> None:
    """Running threads do not keep the dataset alive."""
    code = """
    def make():
        own = PatchDataset(data.shards.folder, 2, 8)
        own.stream = iter(PatchLoader(own, 2, io=loader().io))
        next(own.stream)
    make()
    gc.collect()
    assert all_ended(), ours()
    """
    run(small, io, code)


@pytest.mark.parametrize("io", SOME)
def test_fork_during_iteration(small: Path, io: str) -> None:
    """Whatever locks threads hold at that moment, the child may drop, use, close or keep what it inherited."""
    code = """
    def child(stream, n):
        if n % 5 == 0:
            del stream
            gc.collect()
        elif n % 5 == 1:
            try:
                next(stream)
            except ShardsError as error:
                assert "one forked from it" in str(error)
            else:
                os._exit(7)
        elif n % 5 == 2:
            stream.close()
        elif n % 5 == 3:
            again = loader_here.state_dict()
            assert [len(lr) for lr, _ in islice(loader_here, 30)] == [2] * 30  # more than the read-ahead
            assert len(data[3]) == 2
            assert descriptors() < 40
    loader_here = loader(threads=3, readahead=30)
    for n in range(10):
        stream = iter(loader_here)
        for _ in range(1 + n % 3): next(stream)
        pid = os.fork()
        if not pid:
            child(stream, n)
            if n % 2: sys.exit(0)
            os._exit(0)
        next(stream)
        assert child_ends(pid) == 0, n
        next(stream)
        del stream
    assert all_ended(), ours()
    """
    run(small, io, code)


@pytest.mark.long
@pytest.mark.parametrize("io", WAYS)
def test_unstarted_iterator_after_fork(small: Path, io: str) -> None:
    code = """
    stream = iter(loader())
    pid = os.fork()
    for _ in range(4): next(stream)
    if not pid:
        stream.close()
        assert not ours()
        os._exit(0)
    assert child_ends(pid) == 0
    """
    run(small, io, code)


ENDS = {
    "alive": "stream = iter(loader())\nnext(stream)",
    "referenced by an exception": (
        "try:\n    for batch in loader(): raise MemoryError\nexcept MemoryError as error: kept = error"
    ),
    "by a daemon thread": (
        "threading.Thread(target=lambda: [None for _ in loader()], daemon=True).start()\ntime.sleep(0.3)"
    ),
    "by a daemon thread that calls next": (
        "def use():\n    stream = iter(loader())\n    while True: next(stream)\n"
        "threading.Thread(target=use, daemon=True).start()\ntime.sleep(0.3)"
    ),
    "by daemon threads that start new iterators": (
        "def use():\n    while True:\n        for batch in loader(epochs=1): pass\n"
        "for _ in range(3): threading.Thread(target=use, daemon=True).start()\ntime.sleep(0.3)"
    ),
    "by a daemon thread that waits for slow reads": (
        "from loader.pixels import files\nreal = files.Files.read\nfrom loader.ahead.advice import MappedReader\n"
        "gather = MappedReader.gather\n"
        "files.Files.read = lambda *a: time.sleep(0.2) or real(*a)\n"
        "MappedReader.gather = lambda *a: time.sleep(0.2) or gather(*a)\n"
        "threading.Thread(target=lambda: [None for _ in loader()], daemon=True).start()\ntime.sleep(0.3)"
    ),
    "by another thread": (
        "done = []\ndef use():\n    for batch in loader(epochs=20): done.append(len(batch[0]))\n    print(len(done))\n"
        "threading.Thread(target=use).start()"
    ),
    "at exit": "import atexit\natexit.register(lambda: print(len(next(iter(loader()))[0])))",
}


QUICK = [
    ("by daemon threads that start new iterators", "pread"),
    ("by a daemon thread that waits for slow reads", "mmap"),
    ("by another thread", "pread"),
]


@pytest.mark.parametrize(
    ("way", "io"),
    [pytest.param(way, io, marks=[] if (way, io) in QUICK else LONG) for way in ENDS for io in WAYS],
)
def test_interpreter_exits_quietly(small: Path, io: str, way: str) -> None:
    printed = run(small, io, ENDS[way]).stdout
    assert printed == {"by another thread": "400\n", "at exit": "2\n"}.get(way, "")


@pytest.mark.long
@pytest.mark.parametrize("io", WAYS)
def test_interpreter_exits_despite_hanging_storage(small: Path, io: str) -> None:
    code = """
    from loader.pixels import files
    from loader.ahead import advice as mapped
    from loader.ahead import pipeline
    pipeline.EXIT_PATIENCE = 0.2
    def hang(*a): threading.Event().wait()
    files.Files.read = mapped.MappedReader.gather = hang
    def use():
        next(iter(loader()))
    threading.Thread(target=use, daemon=True).start()
    time.sleep(0.3)
    """
    run(small, io, code)


@pytest.mark.parametrize("io", SOME)
def test_close_from_another_thread(small: Path, io: str) -> None:
    code = """
    for n in range(40):
        stream, given = iter(loader(threads=1 + n % 3)), []
        user = threading.Thread(target=lambda: given.extend(stream))
        user.start()
        while len(given) < n % 4: time.sleep(0.001)
        stream.close()
        user.join()
        assert not ours()
        assert next(stream, None) is None
    """
    run(small, io, code)


@pytest.mark.long
@pytest.mark.parametrize("io", WAYS)
def test_interrupt_loses_no_batch(small: Path, io: str) -> None:
    """After Ctrl-C in a notebook, the next cell continues with the same iterator."""
    code = """
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    from loader.pixels import files
    from loader.ahead import advice as mapped
    read, gather = files.Files.read, mapped.MappedReader.gather
    files.Files.read = lambda *a: time.sleep(0.002) or read(*a)
    mapped.MappedReader.gather = lambda *a: time.sleep(0.004) or gather(*a)
    stream, interrupts = iter(loader(epochs=3)), 0
    given = [next(stream)]  # an interrupt while threads start ends the iterator
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.003)
    while True:
        before = stream.state_dict()["sample"]
        try:
            batch = next(stream, None)
        except KeyboardInterrupt:
            interrupts += 1
            continue
        except RuntimeError:
            break  # interrupted while the iterator was acquired or released: it does not hang
        if batch is None: break
        given.append(batch)
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(interrupts > 3, len(given) > 3)
    """
    # An interrupt may also arrive outside the `try` above; then there is nothing to check.
    text = PREAMBLE.format(folder=str(small), io=io, limit=100) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=160, check=False)
    assert done.stdout == "True True\n" or "KeyboardInterrupt" in done.stderr, done.stderr


@pytest.mark.parametrize("io", SOME)
def test_thread_limit_is_an_error(small: Path, io: str) -> None:
    """As under `ulimit -u` or `-v`: no thread is left behind, and exit does not wait."""
    code = """
    real, started = threading.Thread.start, []
    def start(self):
        if len(started) == allowed: raise RuntimeError("can't start new thread")
        started.append(self)
        real(self)
    threading.Thread.start = start
    for allowed in range(6):
        started.clear()
        stream = iter(loader())
        try:
            given = len(list(islice(stream, 4)))
        except ShardsError as error:
            assert "expected to start a thread, got: can't start new thread" in str(error)
            given = 0
            assert next(stream, None) is None
        stream.close()
        print(given, end=" ")
        assert all_ended()
    """
    printed = run(small, io, code).stdout.split()
    assert printed == (["0", "0", "0"] + ["4"] * 3 if io == "mmap" else ["0", "0", "0"] + ["0"] + ["4"] * 2)


@pytest.mark.long
def test_positional_reads_in_workers(small: Path) -> None:
    """Forked DataLoader workers have their own readers and leave nothing behind, whatever the parent does."""
    code = """
    import torch, functools
    from loader import dataset
    dataset.open_reader = functools.partial(dataset.open_reader, io="pread")
    data[0]
    stream = iter(loader())
    for epoch in range(3):
        data.set_epoch(epoch)
        next(stream)
        work = torch.utils.data.DataLoader(data, 8, num_workers=2, multiprocessing_context="fork")
        assert sum(len(lr) for lr, _ in work) == len(data)
    before = descriptors()
    for _ in range(20):
        own = PatchDataset(data.shards.folder, 2, 8)
        own[0], own[3]
    del own
    gc.collect()
    stream.close()
    for _ in range(1000):
        if descriptors() <= before: break
        time.sleep(0.02)
    else: raise AssertionError((before, descriptors()))
    """
    run(small, "pread", code)


@pytest.mark.long
def test_one_thread_at_a_time(small: Path) -> None:
    code = """
    from loader.ahead import advice as mapped
    gather, go = mapped.MappedReader.gather, threading.Event()
    mapped.MappedReader.gather = lambda *a: go.wait() and gather(*a)
    stream = iter(loader())
    user = threading.Thread(target=lambda: next(stream))
    user.start()
    time.sleep(0.5)
    try: next(stream)
    except RuntimeError as error: print(error)
    go.set()
    user.join()
    next(stream)
    """
    assert "one thread at a time" in run(small, "mmap", code).stdout


def test_errors_are_raised_once(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors keep their type; then the iterator is exhausted."""
    from loader import PatchDataset, PatchLoader
    from loader.ahead.advice import MappedReader

    calls: Iterator[int] = iter(range(1000))
    gather = MappedReader.gather

    def broken(self: Any, *arguments: Any) -> None:
        if next(calls) == 3:
            raise ZeroDivisionError("of a test")
        gather(self, *arguments)

    monkeypatch.setattr(MappedReader, "gather", broken)
    stream = iter(PatchLoader(PatchDataset(small, 2, 8), 2, io="mmap", threads=1))
    assert len([next(stream) for _ in range(3)]) == 3
    with pytest.raises(ZeroDivisionError, match="of a test"):
        next(stream)
    assert list(stream) == []
    with stream as again:
        assert next(again, None) is None
