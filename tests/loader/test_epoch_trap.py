"""Whoever draws the same crops of a PatchDataset all over again is told so once, and nobody else is."""

import copy
import errno
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import build
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset, WeightedRandomSampler

from loader import PatchDataset, PatchLoader
from loader import epoch as epoch_module
from loader.epoch import EpochState, create

WORDS = "the same crops of epoch 0 are being drawn again"
pytestmark = pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")


@pytest.fixture(scope="module")
def dataset(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One container is enough here."""
    return build(folder, tmp_path_factory.mktemp("shards") / "raw", container="raw", scales=(4,))


def told(draw: Callable[[], object]) -> list[str]:
    """Run it, and give the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draw()
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def make(dataset: Path, length: int = 100, **options: Any) -> PatchDataset:
    return PatchDataset(dataset, 4, 4, length=length, **options)


def batches(loader: Any, count: int | None = None) -> int:
    """An epoch of a trainer, or its first batches, as Lightning's limit_train_batches takes them."""
    n = 0
    for n, _ in enumerate(loader, 1):
        if n == count:
            break
    return n


def test_epochs_without_set_epoch(dataset: Path) -> None:
    """Any trainer's loop; the text names all remedies, and the warning is at the line that drew."""
    data = make(dataset)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            for n in range(len(data)):
                data[n]  # this line
    (warning,) = caught
    assert warning.filename == __file__
    assert "# this line" in Path(__file__).read_text(encoding="utf-8").splitlines()[warning.lineno - 1]
    text = str(warning.message)
    for word in (WORDS, "set_epoch(epoch)", "PatchLoader", "fixed=True", "epoch 0", str(dataset)):
        assert word in text
    assert "\n" not in text


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("limit", [None, 10])
def test_lightnings_way(dataset: Path, shuffle: bool, limit: int | None) -> None:
    """Three epochs of ten batches each: 10 distinct batches out of 30."""
    data = make(dataset, 40 if limit else 100)
    loader = DataLoader(data, 4, shuffle=shuffle)
    (text,) = told(lambda: [batches(loader, limit) for _ in range(3)])
    assert WORDS in text


def test_few_batches_of_a_long_epoch(dataset: Path) -> None:
    data = make(dataset, 10_000_000)
    loader = DataLoader(data, 8)
    assert not told(lambda: [batches(loader, 10) for _ in range(2)])
    assert len(told(lambda: batches(loader, 10))) == 1
    part = make(dataset, 10_000_000)
    assert len(told(lambda: [batches(DataLoader(Subset(part, range(70)), 7)) for _ in range(3)])) == 1


def test_an_enlarging_sampler(dataset: Path) -> None:
    """BasicSR's, with ratio 5: 200 draws in an epoch, 40 crops."""
    data = make(dataset, 40)
    sampler = [n % 40 for n in torch.randperm(200).tolist()]
    assert len(told(lambda: batches(DataLoader(data, 8, sampler=sampler)))) == 1


def draws_that_are_fine(dataset: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    data = make(dataset)

    def with_set_epoch() -> None:
        for epoch in range(4):
            data.set_epoch(epoch)
            batches(DataLoader(data, 8, shuffle=True))

    yield "set_epoch", with_set_epoch
    one = make(dataset)
    yield "one epoch", lambda: batches(DataLoader(one, 8))
    look = make(dataset)
    yield "a look, then an epoch", lambda: ([look[0] for _ in range(9)], batches(DataLoader(look, 8)))
    loader = DataLoader(make(dataset, 1000), 8)
    yield "a batch for its shape, then an epoch", lambda: (next(iter(loader)), batches(loader))
    many = DataLoader(make(dataset, 1000), 64)
    yield "several batches, then an epoch", lambda: (batches(many, 4), batches(many))
    again = make(dataset, 1000)
    replaced = RandomSampler(again, replacement=True)
    yield "with replacement", lambda: batches(DataLoader(again, 8, sampler=replaced))
    weighted = make(dataset, 1000)
    sampler = WeightedRandomSampler([1.0 + n % 3 for n in range(1000)], 1000)
    yield "with weights", lambda: batches(DataLoader(weighted, 8, sampler=sampler))
    fixed = make(dataset, fixed=True)
    yield "fixed", lambda: [batches(DataLoader(fixed, 8)) for _ in range(6)]
    others = [make(dataset) for _ in range(5)]
    yield "other datasets", lambda: [batches(DataLoader(other, 8)) for other in others]
    streamed = make(dataset)
    yield "PatchLoader", lambda: [batches(PatchLoader(streamed, 8, epochs=3)) for _ in range(3)]
    told_where = make(dataset)
    yield "crop", lambda: [told_where.crop(n) for _ in range(9) for n in range(100)]


def test_who_is_not_told(dataset: Path) -> None:
    torch.manual_seed(0)
    for name, draw in draws_that_are_fine(dataset):
        assert told(draw) == [], name


def test_the_same_epoch_again(dataset: Path) -> None:
    """Whoever says which epoch it is knows: one may be tried again, after a failure."""
    data = make(dataset)
    for _ in range(3):
        data.set_epoch(4)
        assert not told(lambda: list(data))
    (text,) = told(lambda: list(data))
    assert "the same crops of epoch 4 are being" in text


def test_fixed_crops_stay(dataset: Path) -> None:
    """Frameworks call set_epoch on whatever has it; validation crops are those of epoch 0 all the same."""
    data, plain = make(dataset, fixed=True), make(dataset)
    data.set_epoch(3)
    assert data.epoch == 0
    assert [data.crop(n) for n in range(9)] == [plain.crop(n) for n in range(9)]
    assert data.fixed
    assert not plain.fixed
    with pytest.raises(ValueError, match="epoch: expected 0 to"):
        data.set_epoch(-1)


WORKERS = """
import sys, warnings
from torch.utils.data import DataLoader
from loader import PatchDataset

def main():
    folder, start, persistent = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
    data = PatchDataset(folder, 4, 4, length=200)
    loader = DataLoader(data, 8, num_workers=2, persistent_workers=persistent, multiprocessing_context=start)
    if sys.argv[4] == "set_epoch":
        for epoch in range(3):
            data.set_epoch(epoch)
            for _ in loader: pass
    else:
        for _ in range(4 if start == "fork" else 3):
            for _ in loader: pass
    print("epoch", data.epoch)

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("start", "persistent", "how"),
    [
        ("fork", False, "repeat"),
        ("fork", True, "repeat"),
        ("fork", True, "set_epoch"),
        ("spawn", True, "repeat"),
    ],
)
def test_workers(dataset: Path, tmp_path: Path, start: str, persistent: bool, how: str) -> None:
    """The record is that of all workers, of those that come later too; one warning from all of them."""
    script = tmp_path / "train.py"
    script.write_text(WORKERS)
    run = subprocess.run(
        [sys.executable, "-W", "always::UserWarning", str(script), str(dataset), start, str(persistent), how],
        capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stderr.count(WORDS) == (how == "repeat"), run.stderr
    assert run.stdout == ("epoch 2\n" if how == "set_epoch" else "epoch 0\n")


def test_spawned_workers_that_do_not_persist(dataset: Path) -> None:
    """Each epoch has workers of its own: what they drew is kept by their parent."""
    data = make(dataset, 40)
    loader = DataLoader(data, 8, num_workers=1, multiprocessing_context="spawn")
    batches(loader)
    assert data._state._seen.all()
    data.set_epoch(1)
    assert not data._state._seen.any()


def test_copies_have_records_of_their_own(dataset: Path) -> None:
    data = make(dataset)
    data.set_epoch(5)
    list(data)
    for other in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert other.epoch == 5
        assert len(other) == 100
        assert other.crop(7) == data.crop(7)
        assert not told(partial(list, other))
        other.set_epoch(6)
        assert data.epoch == 5
    assert len(pickle.dumps(make(dataset, 1 << 20))) < 1200
    assert pickle.loads(pickle.dumps(make(dataset, fixed=True))).fixed


def test_a_pickled_dataset_shares_with_its_own_workers(dataset: Path) -> None:
    """The epoch of a dataset that was pickled reaches persistent workers, as that of any other."""
    data = pickle.loads(pickle.dumps(make(dataset, 16)))
    loader = DataLoader(data, 16, num_workers=1, persistent_workers=True, multiprocessing_context="fork")
    drawn = []
    for epoch in range(3):
        data.set_epoch(epoch)
        drawn.append(next(iter(loader))[1])
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[2][5], data[5][1])


def test_a_dataset_handed_over_by_multiprocessing_shares(dataset: Path) -> None:
    queue = torch.multiprocessing.get_context("fork").SimpleQueue()
    data = make(dataset)
    queue.put(data)
    other = queue.get()
    data.set_epoch(9)
    assert other.epoch == 9
    assert not told(lambda: list(data))
    assert len(told(lambda: list(other))) == 1
    queue.close()


def test_descriptors_end_with_the_dataset(dataset: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        make(dataset)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_long_epochs_take_little_memory(dataset: Path) -> None:
    data = make(dataset, 1 << 61)
    assert len(data._state._seen) == epoch_module.TRACKED == 1 << 20
    data[(1 << 61) - 1]
    data[-1]


def no_memory(name: str, flags: int) -> int:
    raise OSError(errno.ENOSYS, "Function not implemented")


def test_without_shared_files(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked workers share all the same; of spawned ones it is said that they do not."""
    monkeypatch.setattr(os, "memfd_create", no_memory)
    data = make(dataset, 40)
    loader = DataLoader(data, 8, num_workers=2, persistent_workers=True, multiprocessing_context="fork")
    for epoch in range(2):
        data.set_epoch(epoch)
        drawn = torch.cat([lr for lr, _ in loader])
        for n in range(0, 40, 7):
            assert torch.equal(drawn[n], data[n][0])
    assert len(told(lambda: list(data))) == 1
    other = make(dataset, 40)
    spawned = DataLoader(other, 8, num_workers=1, multiprocessing_context="spawn")
    (text,) = told(lambda: batches(spawned))
    assert "spawned workers on this system: they keep drawing from the epoch at their start" in text


def test_without_torchs_shared_memory(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full /dev/shm, or one that cannot be written: PatchDataset needs none of it."""

    def full(*_: object) -> None:
        raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    data = make(dataset)
    data.set_epoch(1)
    assert not told(lambda: list(data))


def test_dev_shm_read_only(dataset: Path) -> None:
    """For real, in a mount namespace."""
    code = (
        "from loader import PatchDataset\n"
        f"data = PatchDataset({str(dataset)!r}, 4, 4, length=8)\n"
        "data.set_epoch(2)\nprint(len(list(data)), data.epoch)\n"
        "open('/dev/shm/x', 'w')\n"
    )
    command = f'mount -t tmpfs -o ro,size=4k none /dev/shm && exec {sys.executable} -c "$CODE"'
    run = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"CODE": code, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    if run.returncode and "mount" in run.stderr.splitlines()[0] + "unshare" and "Traceback" not in run.stderr:
        pytest.skip("no mount namespaces here")
    assert run.stdout == "8 2\n", run.stderr
    assert run.stderr.splitlines()[-1] == "OSError: [Errno 30] Read-only file system: '/dev/shm/x'"


def test_memory_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on file sizes, or on memory files: the descriptor is closed, and other memory taken."""
    before = len(list(Path("/proc/self/fd").iterdir()))

    def too_large(descriptor: int, size: int) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "ftruncate", too_large)
    memory, descriptor = create(100)
    assert descriptor is None
    assert memory[:] == bytes(100)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_repeats_within_a_batch_and_the_one_warning() -> None:
    state = EpochState(100, record=True)
    assert not state.repeats(np.zeros(32, np.int64))  # 31 repeats of one sample
    assert state.repeats(np.zeros(1, np.int64))
    assert not any(state.repeats(np.zeros(99, np.int64)) for _ in range(9))
    state.epoch = 1
    assert not any(state.repeats(np.arange(100)) for _ in range(9))
    assert not EpochState(100, record=False).repeats(np.zeros(500, np.int64))


def test_batch_samplers(dataset: Path) -> None:
    data = make(dataset, 64)
    loader = DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 8, drop_last=True))
    assert len(told(lambda: [batches(loader) for _ in range(2)])) == 1
