"""Reading `torch.save` files: everything torch writes, other programs' variants, damage, and decompression bombs."""

from __future__ import annotations

import copy
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT

from model.checkpoints import CheckpointError, infer_config, load_checkpoint, read_raw
from model.shufflemixer import ShuffleMixer
from model.torchfile import archive
from model.torchfile.stored import StoredTensor
from model.torchfile.unpickle import PickleError, read_pickle


def weights() -> dict[str, Any]:
    torch.manual_seed(0)
    return ShuffleMixer(8, 3, 1, 2, scale=2).state_dict()


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def repacked(data: bytes, change: Callable[[dict[str, bytes]], None], **options: Any) -> bytes:
    """Rewrite an archive with zipfile, with `change` applied to its records."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        records = {name: old.read(name) for name in old.namelist()}
    change(records)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as new:
        for name, value in records.items():
            new.writestr(name, value)
    return buffer.getvalue()


def test_reads_what_torch_writes(tmp_path: Path) -> None:
    """Training checkpoints and what other programs add: every value is the one that torch.load returns."""
    path = tmp_path / "a.pt"
    shared = torch.arange(24.0)
    content = {
        "params": weights(),
        "parameter": torch.nn.Parameter(torch.ones(2, 3)),
        "views": [shared[3:9].view(2, 3).T, shared, shared[::5]],
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(3),
        "types": [torch.ones(3).to(t) for t in (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool)],
        "nested": OrderedDict(a=(1, 2.5, None, True, "ü", [], {}), b=-(1 << 40)),
        7: 1 << 62,
        "random": torch.get_rng_state(),
    }
    torch.save(content, path)
    ours, theirs = read_raw(path), torch.load(path, weights_only=True)

    def compare(one: Any, two: Any) -> None:
        if isinstance(two, torch.Tensor):
            assert one.dtype == two.dtype
            assert one.stride() == two.stride()
            assert torch.equal(one, two)
        elif isinstance(two, dict):
            assert list(one) == list(two)
            for key in two:
                compare(one[key], two[key])
        elif isinstance(two, list | tuple):
            assert type(one) is type(two)
            for first, second in zip(one, two, strict=True):
                compare(first, second)
        else:
            assert type(one) is type(two)
            assert one == two

    compare(dict(ours), theirs)


def test_links_are_followed(tmp_path: Path) -> None:
    """Model hubs keep links in their caches."""
    torch.save(weights(), tmp_path / "blob")
    (tmp_path / "weights.pt").symlink_to("blob")
    assert load_checkpoint(tmp_path / "weights.pt").weights_key == "bare"


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"module.module.{name}",
        lambda name: name.replace("blocks.0.", "blocks.0._orig_mod."),
    ],
)
def test_weights_of_wrapped_networks(rename: Callable[[str], str], tmp_path: Path) -> None:
    torch.save({"params": {rename(name): value for name, value in weights().items()}}, tmp_path / "a.pt")
    built = load_checkpoint(tmp_path / "a.pt").build().state_dict()
    assert all(torch.equal(built[name], value) for name, value in weights().items())


def test_duplicate_weights_are_refused(tmp_path: Path) -> None:
    torch.save(weights() | {"module.tail.bias": torch.ones(3)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"expected each weight once, got tail.bias again as module.tail.bias"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.save({name: value.to(dtype) for name, value in weights().items()}, tmp_path / "a.pt")
    for name, value in load_checkpoint(tmp_path / "a.pt").build().state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, weights()[name].to(dtype).float())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), "tail.bias: expected floating-point values, got torch.int64"),
        (torch.zeros(3, dtype=torch.complex64), "got torch.ComplexFloatStorage"),
        (torch.tensor([0.0, float("nan"), 0.0]), "tail.bias: expected finite weights, got NaN or infinity"),
        (torch.tensor([0.0, float("inf"), 0.0]), "tail.bias: expected finite weights, got NaN or infinity"),
        (torch.zeros(3).to_sparse(), "a damaged file or other content"),
        (torch.zeros(1).expand(3), "a tensor within its storage of 1 values, got 3"),
        (torch.zeros(3, device="meta"), "a damaged file or other content"),
    ],
)
def test_invalid_weights_are_refused(value: torch.Tensor, message: str, tmp_path: Path) -> None:
    torch.save(weights() | {"tail.bias": value}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a.pt")


def test_names_in_errors_are_printable(tmp_path: Path) -> None:
    torch.save(weights() | {"\x1b]0;pwned\x07": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"\\x1b\]0;pwned\\x07") as caught:
        load_checkpoint(tmp_path / "a.pt")
    assert str(caught.value).isprintable()


def bomb(kind: str) -> bytes:
    good = saved({"params": weights()})
    match kind:
        case "expanded":
            return saved({"params": weights() | {"tail.weight": torch.zeros(1).expand(1 << 31)}})
        case "deflated":
            return repacked(
                good,
                lambda r: r.update({"archive/data/999": bytes(100 << 20)}),
                compression=zipfile.ZIP_DEFLATED,
            )
        case "shared":  # many tensors in one storage
            large = torch.zeros(1 << 22)
            return saved({"params": weights() | {f"a{i}": large[i:] for i in range(500)}})
        case "blocks":
            one = torch.zeros(1)
            return saved({"params": weights() | {f"blocks.{i}.x": one for i in range(20_000)}})
        case "features":
            names = ShuffleMixer(8, 3, 1, 2, scale=2).state_dict()
            wide = {name: torch.zeros((0, *value.shape[1:])) for name, value in names.items()}
            return saved({"params": wide})
        case "laughs":
            inner: Any = (1, 2)
            for _ in range(14):
                inner = (inner,) * 10
            return saved({"params": weights(), "network": inner})
        case "deep":
            inner = []
            for _ in range(400):
                inner = [inner]
            return saved({"params": weights(), "note": inner})
        case "circle":
            around: dict[str, Any] = {"params": weights()}
            around["self"] = around
            return saved(around)
        case "pickle":
            return repacked(good, lambda r: r.update({"archive/data.pkl": b"\x80\x02" + b"}" * (8 << 20) + b"."}))
        case "dicts":
            return repacked(good, lambda r: r.update({"archive/data.pkl": b"\x80\x02" + b"}" * (3 << 20) + b"."}))
        case _:  # calls bytearray(1 << 40)
            call = b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\1\x85R."
            return repacked(good, lambda r: r.update({"archive/data.pkl": call}))


KINDS = (
    "expanded", "deflated", "shared", "blocks", "features", "laughs", "deep", "circle", "pickle", "dicts", "call",
)  # fmt: skip


def test_bombs_are_refused_in_little_memory(tmp_path: Path) -> None:
    for kind in KINDS:
        (tmp_path / f"{kind}.pt").write_bytes(bomb(kind))
    code = """if True:
        import resource, sys
        from pathlib import Path
        from model.checkpoints import CheckpointError, load_checkpoint, read_raw
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name in sys.argv[1:]:
            for read in (load_checkpoint, read_raw):
                try:
                    content = read(Path(name))
                    print("read")
                except CheckpointError as error:
                    print(error)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    names = [f"{kind}.pt" for kind in KINDS]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300, check=True,
    )  # fmt: skip
    *said, memory = done.stdout.splitlines()
    assert len(said) == 2 * len(KINDS)
    for name, first, second in zip(names, said[::2], said[1::2], strict=True):
        assert first.startswith(f"{name}: "), done.stdout
        assert second == "read" or second.startswith(f"{name}: ")
    assert int(memory) < 700 << 10, f"{int(memory) >> 10} MiB"


def test_sparse_files_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(b"PK\x03\x04")
    os.truncate(path, archive.MAX_FILE + 1)
    with pytest.raises(CheckpointError, match="expected at most 1073741824 bytes, got 1073741825"):
        load_checkpoint(path)
    os.truncate(path, 1 << 29)
    with pytest.raises(CheckpointError, match="damaged file or other content"):
        load_checkpoint(path)


def test_pipes_folders_and_missing_files_are_errors(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "link.pt").symlink_to("nowhere")
    for name, message in (("pipe.pt", "a pipe"), ("folder.pt", "a folder"), ("link.pt", "no such file")):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / name)


def two_pickles(records: dict[str, bytes]) -> None:
    records["other/data.pkl"] = records["archive/data.pkl"]


def big_endian(records: dict[str, bytes]) -> None:
    records["archive/byteorder"] = b"big"


def short_storage(records: dict[str, bytes]) -> None:
    records["archive/data/0"] = records["archive/data/0"][:-4]


def no_storage(records: dict[str, bytes]) -> None:
    del records["archive/data/0"]


def protocol_4(records: dict[str, bytes]) -> None:
    records["archive/data.pkl"] = pickle.dumps({"params": {}}, protocol=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (two_pickles, "expected one data.pkl, got 2"),
        (big_endian, "expected little-endian values"),
        (short_storage, "bytes for storage 0, got"),
        (no_storage, "bytes for storage 0, got None"),
        (protocol_4, "protocol 2"),
    ],
)
def test_invalid_archives_are_refused(change: Callable[[dict[str, bytes]], None], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(repacked(saved(weights()), change))
    for read in (load_checkpoint, read_raw):
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_duplicate_and_overlapping_records_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO(repacked(saved(weights()), lambda records: None))
    with zipfile.ZipFile(buffer, "a") as again:
        again.writestr("archive/data/0", b"other")
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="expected records with unique names, got a duplicate"):
        load_checkpoint(tmp_path / "a.pt")

    data = bytearray(repacked(saved(weights()), lambda records: None))
    first = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", first + 4)
    data[second + 42 : second + 46] = data[first + 42 : first + 46]  # the offset of the record
    (tmp_path / "b.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="overlap|damaged"):
        load_checkpoint(tmp_path / "b.pt")


def test_any_flipped_bit_is_detected_or_harmless(tmp_path: Path) -> None:
    """Harmless bits are in padding, dates and alignment."""
    good = saved({"params": weights()})
    config, expected = infer_config(weights()), weights()
    path = tmp_path / "a.pt"
    for at in range(3, len(good), 97):
        data = bytearray(good)
        data[at] ^= 0x10
        path.write_bytes(data)
        try:
            read = load_checkpoint(path)
        except CheckpointError:
            continue
        assert read.config == config
        assert all(torch.equal(read.weights[name], value) for name, value in expected.items())


def test_legacy_format_is_refused_with_advice(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"expected the format of torch 1.6 or later, got an older one; save it"):
        load_checkpoint(tmp_path / "a.pt")


MARK, END = b"(", b"."
HEAD = b"\x80\x02"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"  # four values


def tensor(offset: bytes, shape: bytes, stride: bytes) -> bytes:
    return HEAD + TENSOR + STORAGE + offset + shape + stride + b"\x89ccollections\nOrderedDict\n)RtR."


def test_handwritten_tensor() -> None:
    read = read_pickle(tensor(b"K\x01", b"K\x03\x85", b"K\x01\x85"))
    assert isinstance(read, StoredTensor)
    assert (read.offset, read.shape, read.stride, read.nbytes) == (1, (3,), (1,), 12)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        HEAD,
        HEAD + END,
        HEAD + b"K\x01K\x02.",
        HEAD + b"(K\x01.",
        HEAD + b"t.",
        HEAD + b"h\x05.",
        HEAD + b"]K\x01a",
        HEAD + b"}]K\x01s.",
        HEAD + b"}(K\x01u.",
        HEAD + b"}J\xff\xff\xff\xffK\x01s.",  # a negative key
        HEAD + b"}G\0\0\0\0\0\0\0\0K\x01s.",
        HEAD + b"K\x01K\x01a.",
        HEAD + b"cos\nsystem\n.",
        HEAD + b"cbuiltins\neval\n.",
        HEAD + b"ccollections\nOrderedDict\nK\x01\x85R.",
        HEAD + b"ccollections\nOrderedDict\nK\x01R.",
        HEAD + b"ctorch\nFloatStorage\nK\x09\x85R.",
        HEAD + b"]}b.",
        HEAD + b"K\x01Q.",
        HEAD + b"((K\x01K\x02K\x03K\x04K\x05tQ.",
        HEAD + TENSOR + b")R.",
        HEAD + TENSOR + b"K\x01\x85R.",
        HEAD + b"0.",
        HEAD + b"2.",
        tensor(b"K\x02", b"K\x03\x85", b"K\x01\x85"),
        tensor(b"J\xff\xff\xff\xff", b"K\x03\x85", b"K\x01\x85"),
        tensor(b"K\0", b"K\x04\x85", b"K\x02\x85"),
        tensor(b"K\0", b"K\x05\x85", b"K\0\x85"),
        tensor(b"K\0", b"K\x03\x85", b"J\xff\xff\xff\xff\x85"),
        tensor(b"K\0", b"K\x03\x85", b")"),
        tensor(b"K\0", b"\x88\x85", b"K\x01\x85"),
        tensor(b"K\0", b"\x8a\x07" + bytes(6) + b"\1\x85", b"K\0\x85"),
    ],
)
def test_foreign_and_damaged_pickles_are_refused(data: bytes) -> None:
    with pytest.raises(PickleError):
        read_pickle(data)


def test_reading_again_changes_nothing(tmp_path: Path) -> None:
    torch.save({"params": weights()}, tmp_path / "a.pt")
    first = read_raw(tmp_path / "a.pt")
    before = copy.deepcopy(first)
    load_checkpoint(tmp_path / "a.pt")
    assert all(torch.equal(value, before["params"][name]) for name, value in first["params"].items())
    assert struct.calcsize("<f") == first["params"]["tail.bias"].element_size()
