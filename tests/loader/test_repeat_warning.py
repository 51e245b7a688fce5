"""Drawing the same crops of a PatchDataset repeatedly warns once; legitimate use does not warn."""

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
    """The container does not matter here: build one."""
    return build(folder, tmp_path_factory.mktemp("shards") / "raw", container="raw", scales=(4,))


def warnings_of(draw: Callable[[], object]) -> list[str]:
    """Call a function; return its UserWarnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draw()
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def make(dataset: Path, length: int = 100, **options: Any) -> PatchDataset:
    return PatchDataset(dataset, 4, 4, length=length, **options)


def batches(loader: Any, count: int | None = None) -> int:
    """Read an epoch, or its first `count` batches as with Lightning's limit_train_batches; return the number read."""
    n = 0
    for n, _ in enumerate(loader, 1):
        if n == count:
            break
    return n


def test_epochs_without_set_epoch_warn_once(dataset: Path) -> None:
    """The message names all remedies; the warning points at the line that drew."""
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
def test_lightning_style_loops_warn(dataset: Path, shuffle: bool, limit: int | None) -> None:
    """Read three epochs of ten batches each: 10 distinct batches out of 30."""
    data = make(dataset, 40 if limit else 100)
    loader = DataLoader(data, 4, shuffle=shuffle)
    (text,) = warnings_of(lambda: [batches(loader, limit) for _ in range(3)])
    assert WORDS in text


def test_few_batches_of_a_long_epoch_warn(dataset: Path) -> None:
    data = make(dataset, 10_000_000)
    loader = DataLoader(data, 8)
    assert not warnings_of(lambda: [batches(loader, 10) for _ in range(2)])
    assert len(warnings_of(lambda: batches(loader, 10))) == 1
    part = make(dataset, 10_000_000)
    assert len(warnings_of(lambda: [batches(DataLoader(Subset(part, range(70)), 7)) for _ in range(3)])) == 1


def test_enlarging_sampler_warns(dataset: Path) -> None:
    """BasicSR's EnlargedSampler with ratio 5: 200 draws of 40 crops per epoch."""
    data = make(dataset, 40)
    sampler = [n % 40 for n in torch.randperm(200).tolist()]
    assert len(warnings_of(lambda: batches(DataLoader(data, 8, sampler=sampler)))) == 1


def legitimate_uses(dataset: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    data = make(dataset)

    def with_set_epoch() -> None:
        for epoch in range(4):
            data.set_epoch(epoch)
            batches(DataLoader(data, 8, shuffle=True))

    yield "set_epoch", with_set_epoch
    one = make(dataset)
    yield "one epoch", lambda: batches(DataLoader(one, 8))
    look = make(dataset)
    yield "some samples, then an epoch", lambda: ([look[0] for _ in range(9)], batches(DataLoader(look, 8)))
    loader = DataLoader(make(dataset, 1000), 8)
    yield "a batch, then an epoch", lambda: (next(iter(loader)), batches(loader))
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
    positions = make(dataset)
    yield "crop", lambda: [positions.crop(n) for _ in range(9) for n in range(100)]


def test_legitimate_use_does_not_warn(dataset: Path) -> None:
    torch.manual_seed(0)
    for name, draw in legitimate_uses(dataset):
        assert warnings_of(draw) == [], name


def test_setting_the_same_epoch_restarts_the_record(dataset: Path) -> None:
    """A user may repeat an epoch on purpose, after a failure."""
    data = make(dataset)
    for _ in range(3):
        data.set_epoch(4)
        assert not warnings_of(lambda: list(data))
    (text,) = warnings_of(lambda: list(data))
    assert "the same crops of epoch 4 are being" in text


def test_fixed_crops_ignore_set_epoch(dataset: Path) -> None:
    """Frameworks call set_epoch on any dataset that has it; validation crops stay those of epoch 0."""
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
def test_record_is_shared_by_workers(dataset: Path, tmp_path: Path, start: str, persistent: bool, how: str) -> None:
    """Current and later workers share one record and warn once."""
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


def test_record_outlives_spawned_workers(dataset: Path) -> None:
    """Each epoch has new workers; the parent keeps the record of what they drew."""
    data = make(dataset, 40)
    loader = DataLoader(data, 8, num_workers=1, multiprocessing_context="spawn")
    batches(loader)
    assert data._state._seen.all()
    data.set_epoch(1)
    assert not data._state._seen.any()


def test_copies_have_their_own_record(dataset: Path) -> None:
    data = make(dataset)
    data.set_epoch(5)
    list(data)
    for other in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert other.epoch == 5
        assert len(other) == 100
        assert other.crop(7) == data.crop(7)
        assert not warnings_of(partial(list, other))
        other.set_epoch(6)
        assert data.epoch == 5
    assert len(pickle.dumps(make(dataset, 1 << 20))) < 1200
    assert pickle.loads(pickle.dumps(make(dataset, fixed=True))).fixed


def test_unpickled_dataset_shares_epoch_with_its_workers(dataset: Path) -> None:
    """Persistent workers of an unpickled dataset see its epoch change."""
    data = pickle.loads(pickle.dumps(make(dataset, 16)))
    loader = DataLoader(data, 16, num_workers=1, persistent_workers=True, multiprocessing_context="fork")
    drawn = []
    for epoch in range(3):
        data.set_epoch(epoch)
        drawn.append(next(iter(loader))[1])
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[2][5], data[5][1])


def test_dataset_sent_by_multiprocessing_shares_epoch(dataset: Path) -> None:
    queue = torch.multiprocessing.get_context("fork").SimpleQueue()
    data = make(dataset)
    queue.put(data)
    other = queue.get()
    data.set_epoch(9)
    assert other.epoch == 9
    assert not warnings_of(lambda: list(data))
    assert len(warnings_of(lambda: list(other))) == 1
    queue.close()


def test_dropping_dataset_closes_descriptors(dataset: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        make(dataset)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_long_epochs_use_little_memory(dataset: Path) -> None:
    data = make(dataset, 1 << 61)
    assert len(data._state._seen) == epoch_module.TRACKED == 1 << 20
    data[(1 << 61) - 1]
    data[-1]


def no_memory(name: str, flags: int) -> int:
    raise OSError(errno.ENOSYS, "Function not implemented")


def test_without_memfd(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked workers still share the epoch; spawned ones trigger a warning."""
    monkeypatch.setattr(os, "memfd_create", no_memory)
    data = make(dataset, 40)
    loader = DataLoader(data, 8, num_workers=2, persistent_workers=True, multiprocessing_context="fork")
    for epoch in range(2):
        data.set_epoch(epoch)
        drawn = torch.cat([lr for lr, _ in loader])
        for n in range(0, 40, 7):
            assert torch.equal(drawn[n], data[n][0])
    assert len(warnings_of(lambda: list(data))) == 1
    other = make(dataset, 40)
    spawned = DataLoader(other, 8, num_workers=1, multiprocessing_context="spawn")
    (text,) = warnings_of(lambda: batches(spawned))
    assert "spawned workers on this system: they keep drawing from the epoch at their start" in text


def test_without_torchs_shared_memory(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PatchDataset works if /dev/shm is full or read-only."""

    def full(*_: object) -> None:
        raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    data = make(dataset)
    data.set_epoch(1)
    assert not warnings_of(lambda: list(data))


def test_read_only_dev_shm(dataset: Path) -> None:
    """Mount /dev/shm read-only in a mount namespace."""
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


def test_ftruncate_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """If memfd cannot grow, close it and use anonymous memory."""
    before = len(list(Path("/proc/self/fd").iterdir()))

    def too_large(descriptor: int, size: int) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "ftruncate", too_large)
    memory, descriptor = create(100)
    assert descriptor is None
    assert memory[:] == bytes(100)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_repeats_within_a_batch() -> None:
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
    assert len(warnings_of(lambda: [batches(loader) for _ in range(2)])) == 1
