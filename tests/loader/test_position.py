"""Positions: each iterator has its own; a saved one is valid in the same stream only, and validated when loaded."""

import json
import pickle
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Pixels, build, photograph, write_image
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Subset

from loader import PatchDataset, PatchIterator, PatchLoader, ShardsError
from loader.format.identity import dataset_identity
from loader.format.layout import HR, Index, LrOrigin, Plane, Shard, Strings
from loader.stream.position import Stream
from model.checkpoints import read_raw


def taken(loader: PatchLoader, count: int) -> PatchIterator:
    iterator = iter(loader)
    for _ in range(count):
        next(iterator)
    return iterator


def test_each_iterator_has_its_position(dataset: Path) -> None:
    loader = PatchLoader(PatchDataset(dataset, 4, 8, length=25), 4)
    assert loader.state_dict()["sample"] == 0
    first = taken(loader, 3)
    second = taken(loader, 1)
    assert isinstance(first, PatchIterator)
    assert (first.state_dict()["sample"], second.state_dict()["sample"]) == (12, 4)
    assert loader.state_dict() == second.state_dict()
    next(first)
    assert (first.state_dict()["sample"], loader.state_dict()["sample"]) == (16, 4)
    second.close()
    assert next(second, None) is None
    assert loader.state_dict()["sample"] == 4
    next(first)
    with first:
        assert first.state_dict()["sample"] == 20
    assert list(first) == []


def test_resume_at_the_end_of_a_stream(dataset: Path) -> None:
    data = PatchDataset(dataset, 4, 8, length=25)
    loader = PatchLoader(data, 10, epochs=2)
    assert [len(lr) for lr, _ in loader] == [10] * 5
    again = PatchLoader(data, 10, epochs=2)
    again.load_state_dict(loader.state_dict())
    assert list(again) == []
    assert len(again) == 0


def test_state_survives_serialisation(dataset: Path, tmp_path: Path) -> None:
    """A position survives a checkpoint loaded as weights, JSON, and pickling of the loader."""
    loader = PatchLoader(PatchDataset(dataset, 4, 8, seed=(1 << 64) - 1), 4)
    state = taken(loader, 2).state_dict()
    torch.save({"position": state}, tmp_path / "x.pt")
    for copy in (json.loads(json.dumps(state)), dict(read_raw(tmp_path / "x.pt"))["position"]):
        assert copy == state
        loader.load_state_dict(copy)
        assert loader.state_dict() == state
    twin = pickle.loads(pickle.dumps(loader))
    assert twin.state_dict() == state
    assert torch.equal(next(iter(twin))[1], next(iter(loader))[1])


def test_identity_depends_on_images_only(folder: Path, tmp_path: Path) -> None:
    found = set()
    for n, (container, per_shard) in enumerate((("raw", 1), ("hdf5", 9))):
        out = build(folder, tmp_path / str(n), container=container, images_per_shard=per_shard)
        found.add(tuple(PatchLoader(PatchDataset(out, 4, 8), 1).state_dict()["datasets"]))
    assert len(found) == 1
    write_image(tmp_path / "other" / "a.png", photograph(64, 64))
    other = build(tmp_path / "other", tmp_path / "others")
    ours, theirs = (PatchLoader(PatchDataset(out, 4, 8, length=25), 1) for out in (out, other))
    state = taken(theirs, 3).state_dict()
    with pytest.raises(ShardsError, match=r"dataset: expected \w{64}, got \w{64}: other pixels, other images, or ano"):
        ours.load_state_dict(state)
    ours.load_state_dict(state, allow_other_dataset=True)
    assert ours.state_dict()["sample"] == 3
    longer = PatchLoader(PatchDataset(out, 4, 8, length=26), 1)
    longer.load_state_dict(state, allow_other_dataset=True)
    with pytest.raises(ShardsError, match="seed: expected 1, got 0$"):
        PatchLoader(PatchDataset(out, 4, 8, length=25, seed=1), 1).load_state_dict(state, allow_other_dataset=True)


def test_all_differences_are_reported_at_once(dataset: Path) -> None:
    state = PatchLoader(PatchDataset(dataset, 4, 8, 25, seed=1), 1).state_dict()
    other = PatchLoader(PatchDataset(dataset, 2, 9, 26, seed=2, augment=False), 1)
    for allowed in (False, True):
        with pytest.raises(ShardsError) as caught:
            other.load_state_dict(state, allow_other_dataset=allowed)
        differences = ["seed: expected 2, got 1", "scale: expected 2, got 4", "lr_patch: expected 9, got 8"]
        differences += ["augment: expected False, got True"]
        assert all(one in str(caught.value) for one in differences)
        assert ("length: expected 26, got 25" in str(caught.value)) is not allowed
        assert ("dataset" in str(caught.value)) is not allowed
    assert other.state_dict()["sample"] == 0


OURS = Stream(25, 1, 4, 8, augment=True, datasets=("0" * 64,))
HUGE = 1 << 200_000  # too large for Python to print
ANY: list[Any] = [-1, True, 1.0, "1", None, HUGE, -HUGE, [], torch.zeros(3), b"1", float("nan")]
LISTS: list[Any] = [[], "0" * 64, [1], ["0" * 63], ["G" * 64], [["0" * 64]], None, {}, [HUGE]]
WRONG: list[tuple[str, Any]] = [
    *((name, value) for name in ("sample", "length", "seed", "scale", "lr_patch") for value in ANY),
    *(("augment", value) for value in ANY if value is not True),
    *(("datasets", value) for value in LISTS),
    ("sample", 1 << 63),
    ("seed", 1 << 64),
    ("length", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: type(value).__name__)
def test_invalid_state_values(name: str, value: Any) -> None:
    with pytest.raises(ShardsError, match=rf"^position in the sample stream: {name}: expected .*, got .*") as caught:
        OURS.load(OURS.save(7) | {name: value})
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("state", [None, [], "sample", 3, torch.zeros(2), [("sample", 3)]])
def test_states_of_other_types(state: Any) -> None:
    with pytest.raises(ShardsError, match="expected a mapping"):
        OURS.load(state)


def test_missing_and_unknown_state_fields() -> None:
    with pytest.raises(ShardsError, match="expected augment, datasets, lr_patch, scale, got none"):
        OURS.load({"sample": 3, "seed": 1, "length": 25})
    with pytest.raises(ShardsError, match=r"only known fields, got '\\x1b\[31m'"):
        OURS.load(OURS.save(3) | {"\x1b[31m": 1})
    with pytest.raises(ShardsError, match="only known fields, got 4"):
        OURS.load(OURS.save(3) | {4: 1})


VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=4,
)


@settings(deadline=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(OURS.save(0))) | st.text(max_size=3), VALUES, max_size=4))
def test_any_state_is_accepted_or_refused(changes: dict[str, Any]) -> None:
    state = OURS.save(5) | changes
    try:
        sample = OURS.load(state)
    except ShardsError:
        return
    assert type(sample) is int
    assert OURS.save(sample) == state


def test_stream_starts_at_the_dataset_epoch(dataset: Path) -> None:
    """As with torch's DistributedSampler: call set_epoch before each pass."""
    data = PatchDataset(dataset, 4, 8, length=25, seed=3)
    loader, whole = PatchLoader(data, 5, epochs=1), list(PatchLoader(data, 5, epochs=4))
    for epoch in (0, 1, 3):
        data.set_epoch(epoch)
        assert len(loader) == 5
        for found, wanted in zip(loader, whole[5 * epoch : 5 * epoch + 5], strict=True):
            assert torch.equal(found[1], wanted[1])
        assert loader.state_dict()["sample"] == 25 * (epoch + 1)
    assert len(list(PatchLoader(data, 5, epochs=1, start=20))) == 1  # counted from sample 0


def test_resume_within_an_epoch_then_set_epoch(dataset: Path) -> None:
    data = PatchDataset(dataset, 4, 8, length=25, seed=3)
    whole = [hr for _, hr in PatchLoader(data, 5, epochs=4)]
    data.set_epoch(1)
    state = taken(PatchLoader(data, 5, epochs=1), 2).state_dict()
    resumed, found = PatchLoader(data, 5, epochs=1), []
    resumed.load_state_dict(state)
    for epoch in (1, 2, 3):
        data.set_epoch(epoch)
        found += [hr for _, hr in resumed]
    assert len(found) == 13
    assert all(torch.equal(a, b) for a, b in zip(found, whole[7:], strict=True))


@pytest.mark.parametrize("kind", [np.int32, np.uint8, np.int64, torch.tensor])
def test_loader_accepts_any_integer_type(dataset: Path, kind: Any) -> None:
    names = ("batch_size", "world_size", "start", "epochs", "readahead", "threads")
    loader = PatchLoader(PatchDataset(dataset, 4, 8), **{name: kind(2) for name in names}, rank=kind(1))
    assert len(list(islice(loader, 3))) == 3
    assert json.dumps(loader.state_dict())


@pytest.mark.parametrize("name", ["batch_size", "rank", "world_size", "start", "epochs", "readahead", "threads"])
@pytest.mark.parametrize("value", ["2", 2.0, 1.5, [2], b"2", 1 << 70])
def test_loader_refuses_non_integers(dataset: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        PatchLoader(PatchDataset(dataset, 4, 8), **({"batch_size": 2} | {name: value}))


def test_loader_refuses_other_datasets(dataset: Path) -> None:
    data = PatchDataset(dataset, 4, 8)
    others: list[Any] = [ConcatDataset([data, data]), Subset(data, [1]), [data], dataset]
    for other in others:
        with pytest.raises(
            TypeError, match=rf"dataset: expected a PatchDataset, got {type(other).__name__}; build one"
        ):
            PatchLoader(other, 4)


def large_index(count: int) -> Index:
    rng = np.random.default_rng(0)
    crc = [rng.integers(0, 1 << 32, count) for _ in range(2)]
    zeros = np.zeros(count, np.int64)
    planes = {scale: Plane(64, zeros, crc32, None, None) for scale, crc32 in zip((HR, 4), crc, strict=True)}
    height, width = (rng.integers(64, 2048, count) for _ in range(2))
    name = Strings([f"größe-{i:07}" for i in range(count)])
    return Index(
        container="raw",
        made_by="",
        libraries={},
        lr=LrOrigin("imresize"),
        images_per_shard=count,
        shards=(Shard("a", 1, ""),),
        name=name,
        shard=zeros,
        height=height,
        width=width,
        planes=planes,
    )


@pytest.mark.long
def test_identity_of_a_million_images() -> None:
    """Print the time of the first state_dict(); it depends on the machine, so nothing is asserted."""
    index = large_index(1_000_000)
    start = time.perf_counter()
    dataset_identity(index, 4)
    print(f"{time.perf_counter() - start:.2f} s")


def test_pinned_batches_share_storage_with_torch(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, pictures: dict[str, Pixels]
) -> None:
    """torch's allocator reuses page-locked memory only after copies of the storage that it returned."""
    given: dict[int, torch.Tensor] = {}
    real = torch.empty

    def empty(*arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        tensor = real(*arguments, **options)
        if pin_memory:
            given[tensor.untyped_storage()._cdata] = tensor
        return tensor

    monkeypatch.setattr(torch, "empty", empty)
    data = PatchDataset(dataset, 4, 8)
    plain = list(islice(PatchLoader(data, 4, pin_memory=False), 6))
    assert not given
    kept = []
    for batch, wanted in zip(islice(PatchLoader(data, 4, pin_memory=True), 6), plain, strict=True):
        kept.append(batch)
        for part, same in zip(batch, wanted, strict=True):
            assert torch.equal(part, same)
            assert part.is_contiguous(memory_format=torch.channels_last)
            for view in (part, part[2:], part[1:3, 1]):
                assert view.untyped_storage()._cdata in given
    assert len({part.data_ptr() for batch in kept for part in batch}) == 12  # never reused by us
