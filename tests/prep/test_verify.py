"""`prep verify`: it names every kind of damage, compares pixels with their sources and repairs damaged shards."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers import Pixels, build, photograph, write_image

from loader.format.index import read_index
from loader.format.index_text import dump_index
from loader.format.layout import HR, Index, Plane
from loader.resize.imresize import imresize
from prep.cli import main
from prep.shard.checksums import GAP, Segment, blocks, check_shard, is_padded, segments
from prep.verify.sources import SourceImages
from prep.verify.verify import _in_threads, check_shards, repair_shards


def verify(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["verify", *map(str, arguments)])
    assert "Traceback" not in result.output
    assert result.exit_code != 1 or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    """A dataset to damage: five images in three shards at ×2, ×3 and ×4."""
    shutil.copytree(dataset, tmp_path / "data")
    return tmp_path / "data"


def damage(path: Path, at: int, data: bytes = b"\x55\xaa") -> None:
    with path.open("r+b") as file:
        before = os.pread(file.fileno(), len(data), at)
        os.pwrite(file.fileno(), bytes(a ^ b for a, b in zip(before, data, strict=True)), at)


def locate(folder: Path, image: int, scale: int) -> tuple[Path, int]:
    """Return the shard of an image and the offset of its tile run in a plane."""
    index = read_index(folder)
    return folder / index.shards[int(index.shard[image])].file, int(index.planes[scale].offset[image])


def rewrite(folder: Path, index: Index) -> None:
    """Write an index that records the shards as they are now."""
    shards = []
    for shard in index.shards:
        data = (folder / shard.file).read_bytes()
        shards.append(replace(shard, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    (folder / "index.json").write_bytes(dump_index(replace(index, shards=tuple(shards))))


def planes_with(index: Index, scale: int, column: str, image: int, value: int) -> dict[int, Plane]:
    values = getattr(index.planes[scale], column).copy()
    values[image] = value
    return index.planes | {scale: replace(index.planes[scale], **{column: values})}


@pytest.mark.parametrize("workers", [1, 4])
def test_intact_dataset(dataset: Path, folder: Path, workers: int) -> None:
    for arguments, verdict in (
        ([], "everything matches the index"),
        (["--quick"], "lengths and HDF5 structure match the index; pixels were not read"),
        (["--source", folder], "everything matches the index and the sources"),
    ):
        result = verify(dataset, "--workers", workers, *arguments)
        assert result.exit_code == 0
        lines = result.stdout.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(f"{dataset}: 5 images in 3 shards, ")
        assert lines[0].endswith(f": {verdict}")


def test_every_damaged_plane_is_named(copy: Path) -> None:
    """Two planes of one image, one of another, and a missing shard: one line each."""
    for image, scale in ((0, HR), (0, 3), (1, 4)):
        path, offset = locate(copy, image, scale)
        damage(path, offset + 3 * 64 + 1)
    gone = locate(copy, 4, HR)[0]
    gone.unlink()
    result = verify(copy)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert len(lines) == 6
    assert ": sha256: expected " in lines[0]
    assert sorted(line.split(": ", 1)[1].split(": ")[0] for line in lines[1:4]) == [
        "HR of image 'a'", "X3 of image 'a'", "X4 of image 'b'",
    ]  # fmt: skip
    assert all(": crc32: expected " in line and line.startswith(str(path)) for line in lines[1:4])
    assert lines[4].startswith(f"{gone}: expected a file of ")
    assert lines[5].endswith("5 findings in 2 shards")
    quick = verify(copy, "--quick")
    assert quick.exit_code == 1
    assert quick.stdout.splitlines()[0] == lines[4]
    assert len(quick.stdout.splitlines()) == 2


def test_wrong_lengths(copy: Path) -> None:
    path, offset = locate(copy, 1, 4)
    data = path.read_bytes()
    path.write_bytes(data[: offset + 10])
    lines = verify(copy).stdout.splitlines()
    assert lines[0].startswith(f"{path}: length: expected a file of {len(data)} bytes, got {offset + 10} bytes")
    assert any("X4 of image 'b': expected bytes" in line and "got the end of the file" in line for line in lines)
    path.write_bytes(data + b"\0")
    lines = verify(copy).stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith(f"got {len(data) + 1} bytes")


def test_pipes_and_links_are_not_read(copy: Path, tmp_path: Path) -> None:
    """Reading a pipe would block, and a link's target is not part of the dataset."""
    index = read_index(copy)
    pipe, link = (copy / index.shards[number].file for number in (0, 1))
    pipe.unlink()
    os.mkfifo(pipe)
    link.rename(tmp_path / "outside")
    link.symlink_to(tmp_path / "outside")
    for arguments in ([], ["--quick"]):
        lines = verify(copy, *arguments).stdout.splitlines()
        assert lines[0] == f"{pipe}: file: expected a file in this folder, got a pipe, not a regular file"
        assert lines[1] == f"{link}: file: expected a file in this folder, got a link to {tmp_path}/outside"
        assert len(lines) == 3


def test_damage_between_runs(copy: Path) -> None:
    index = read_index(copy)
    gap = next(segment for segment in segments(index, 0) if segment.level == GAP)
    path = copy / index.shards[0].file
    damage(path, gap.start + 9)
    lines = verify(copy).stdout.splitlines()
    assert ": sha256: expected " in lines[0]
    if index.container == "raw":
        assert "between runs: expected zeros, got others" in lines[1]
    else:
        assert lines[0].endswith("; all its planes are intact")


@pytest.mark.parametrize("side", ["right", "lower"])
def test_padding(copy: Path, side: str) -> None:
    """Bytes beyond the image's edge, although shard and index agree."""
    index = read_index(copy)
    image = list(index.name).index("b")  # 131 × 97: padded on both sides
    path, offset = locate(copy, image, HR)
    tile = 64
    at = (1 * tile * tile + 40) * 3 if side == "right" else ((2 * 2) * tile * tile + 4 * tile) * 3
    damage(path, offset + at)
    start, stop = offset, offset + int(index.run_lengths(HR)[image])
    crc = zlib.crc32(path.read_bytes()[start:stop])
    rewrite(copy, replace(index, planes=planes_with(index, HR, "crc32", image, crc)))
    lines = verify(copy).stdout.splitlines()
    assert len(lines) == 2
    assert lines[0] == f"{path}: HR of image 'b': padding: expected zeros beyond the image's edge, got others"


def test_wrong_checksum_in_the_index(copy: Path) -> None:
    index = read_index(copy)
    rewrite(copy, replace(index, planes=planes_with(index, 2, "crc32", 3, 7)))
    lines = verify(copy).stdout.splitlines()
    assert len(lines) == 2
    assert "X2 of image 'd e': crc32: expected 7, got " in lines[0]


def test_damaged_index(copy: Path, folder: Path) -> None:
    damage(copy / "index.json", 300)
    for arguments in ([], ["--quick"]):
        result = verify(copy, *arguments)
        assert result.exit_code == 1
        assert result.stderr.count("\n") == 1
        assert "index.json: sha256: expected the SHA-256 of all lines before it as the last line" in result.stderr
    assert (
        "an index cannot be repaired: rebuild the dataset with build-shards --overwrite"
        in verify(copy, "--repair", "--source", folder).stderr
    )


@pytest.fixture
def hdf5(folder: Path, tmp_path: Path) -> Path:
    return build(folder, tmp_path / "data", images_per_shard=9)


def swap_names(file: h5py.File) -> None:
    file.move("HR/a", "HR/x")
    file.move("HR/c", "HR/a")
    file.move("HR/x", "HR/c")


def add(file: h5py.File) -> None:
    file["HR/extra"] = np.zeros((3, 3), np.uint8)


def turn(file: h5py.File) -> None:
    shape = file["HR/a"].shape
    file["HR/a"].resize((shape[0] - 1, shape[1], 3))


def remove(file: h5py.File) -> None:
    del file["LR_bicubic/X4/b"]


def compress(file: h5py.File) -> None:
    pixels = file["HR/a"][()]
    del file["HR/a"]
    file.create_dataset("HR/a", data=pixels, chunks=(64, 64, 3), compression=1)


def flatten(file: h5py.File) -> None:
    pixels = file["HR/a"][()]
    del file["HR/a"]
    file.create_dataset("HR/a", data=pixels)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (swap_names, "HR of image 'a': HDF5: shape: expected (128, 192, 3), got (64, 64, 3)"),
        (add, "HR: expected 5 datasets, got 6"),
        (turn, "HR of image 'a': HDF5: shape: expected (128, 192, 3), got (127, 192, 3)"),
        (remove, "X4 of image 'b': HDF5: expected a dataset, got none"),
        (compress, "HR of image 'a': HDF5: filters: expected 0, got 1"),
        (flatten, "HR of image 'a': HDF5: chunks: expected (64, 64, 3), got None"),
    ],
)
def test_hdf5_structure(hdf5: Path, edit: object, message: str) -> None:
    """The recorded digest matches, but the datasets in the shard differ from the index."""
    index = read_index(hdf5)
    with h5py.File(hdf5 / index.shards[0].file, "r+") as file:
        edit(file)  # type: ignore[operator]
    rewrite(hdf5, index)
    for arguments in ([], ["--quick"]):
        result = verify(hdf5, *arguments)
        assert result.exit_code == 1
        assert message in result.stdout


def test_hdf5_datasets_at_wrong_offsets(hdf5: Path) -> None:
    """Two planes of one image whose offsets are swapped in the index."""
    index = read_index(hdf5)
    first, second = ((int(index.planes[scale].offset[2])) for scale in (2, 4))  # 32 × 32 and 16 × 16: one tile each
    rewrite(hdf5, replace(index, planes=planes_with(index, 2, "offset", 2, second) | {
        4: planes_with(index, 4, "offset", 2, first)[4]
    }))  # fmt: skip
    lines = verify(hdf5, "--quick").stdout.splitlines()
    assert f"X2 of image 'c': HDF5: first chunk: expected {second}, got {first}" in lines[0]
    assert f"X4 of image 'c': HDF5: first chunk: expected {first}, got {second}" in lines[1]


def test_not_an_hdf5_file(hdf5: Path) -> None:
    index = read_index(hdf5)
    path = hdf5 / index.shards[0].file
    path.write_bytes(bytes(path.stat().st_size))
    assert "expected an HDF5 file, got one that cannot be opened" in verify(hdf5, "--quick").stdout
    assert ": sha256: expected" in verify(hdf5).stdout


@pytest.fixture
def sources(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "images")
    return tmp_path / "images"


def test_changed_and_missing_sources(dataset: Path, sources: Path) -> None:
    write_image(sources / "a.png", photograph(128, 192, seed=77))
    (sources / "c.png").unlink()
    (sources / "ü.png").rename(sources / "ü.bmp")
    result = verify(dataset, "--source", sources)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    assert "image 'a': source: " in lines[0]
    assert "a.png: changed since the build: sha256: expected " in lines[0]
    assert f"image 'c': source: c.png: expected this file in {sources}, got none" in lines[1]
    assert "image 'ü': source: ü.png: expected this file in" in lines[2]


def test_several_sources(dataset: Path, sources: Path, tmp_path: Path) -> None:
    """Single files, and a folder with another file of the same name."""
    write_image(tmp_path / "other/a.png", photograph(9, 9))
    for name in ("b.png", "c.png"):
        (sources / name).rename(tmp_path / name)
    given = [tmp_path / "other", sources, tmp_path / "b.png", tmp_path / "c.png"]
    result = verify(dataset, *(word for source in given for word in ("--source", source)))
    assert result.exit_code == 0, result.output


def test_pixels_that_differ_from_the_sources(copy: Path, folder: Path) -> None:
    """Shard and index agree with each other, but not with the images."""
    index = read_index(copy)
    planes = index.planes
    for scale, image in ((HR, 0), (3, 1)):
        path, offset = locate(copy, image, scale)
        damage(path, offset + 3 * (planes[scale].tile + 2), b"\x01")
        end = offset + int(index.run_lengths(scale)[image])
        crc = zlib.crc32(path.read_bytes()[offset:end])
        planes = planes | {scale: planes_with(index, scale, "crc32", image, crc)[scale]}
    rewrite(copy, replace(index, planes=planes))
    assert verify(copy).exit_code == 0
    result = verify(copy, "--source", folder)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert "HR of image 'a': expected the pixels of " in lines[0]
    assert lines[0].endswith("a.png, got 1 different pixels, the first at row 1, column 2")
    assert "X3 of image 'b': expected the pixels of " in lines[1]
    assert len(lines) == 3
    # --repair does not change shards that match the index.
    assert verify(copy, "--source", folder, "--repair").stdout.splitlines()[:2] == lines[:2]


@pytest.fixture
def given(folder: Path, pictures: dict[str, Pixels], tmp_path: Path) -> tuple[Path, Path]:
    for name, hr in pictures.items():
        for scale in (2, 4):
            write_image(tmp_path / f"lr/X{scale}/{name}x{scale}.png", 255 - imresize(hr, scale))
    return build(folder, tmp_path / "data", lr=tmp_path / "lr"), tmp_path / "lr"


def test_given_lr(given: tuple[Path, Path], folder: Path) -> None:
    data, lr = given
    result = verify(data, "--source", folder)
    assert result.exit_code == 0
    assert result.stdout.endswith("except the given LR (compare it with --lr)\n")
    result = verify(data, "--source", folder, "--lr", lr)
    assert result.exit_code == 0
    assert result.stdout.endswith("matches the index and the sources\n")
    path = locate(data, 0, HR)[0]
    path.unlink()
    assert (
        f"{path}: not repaired: its LR was given: name its folder with --lr"
        in verify(data, "--source", folder, "--repair").stdout
    )
    assert verify(data, "--source", folder, "--lr", lr, "--repair").exit_code == 0
    write_image(lr / "X2/ax2.png", photograph(64, 96))
    assert "ax2.png: changed since the build" in verify(data, "--source", folder, "--lr", lr).stdout


@pytest.mark.parametrize("harm", ["flip", "truncated", "grown", "missing", "replaced by a link", "header"])
def test_repair(copy: Path, folder: Path, dataset: Path, tmp_path: Path, harm: str) -> None:
    path, offset = locate(copy, 0, HR)
    if harm in ("flip", "header"):
        damage(path, offset + 99 if harm == "flip" else 16)
    elif harm == "truncated":
        os.truncate(path, offset + 10)
    elif harm == "grown":
        path.write_bytes(path.read_bytes() + b"more")
    else:
        path.unlink()
    if harm.startswith("replaced"):
        (tmp_path / "elsewhere").write_bytes(b"not to be touched")
        path.symlink_to(tmp_path / "elsewhere")
    others = {file.name: file.stat().st_mtime_ns for file in copy.iterdir() if file != path}
    result = verify(copy, "--source", folder, "--repair")
    assert result.exit_code == 0, result.output
    assert f"{path}: repaired" in result.stdout
    assert ": 1 shards repaired, everything matches the index" in result.stdout
    assert path.read_bytes() == (dataset / path.name).read_bytes()
    assert not path.is_symlink()
    assert {file.name: file.stat().st_mtime_ns for file in copy.iterdir() if file != path} == others
    if harm.startswith("replaced"):
        assert (tmp_path / "elsewhere").read_bytes() == b"not to be touched"


def test_unrepairable_shard_is_unchanged(copy: Path, dataset: Path, sources: Path) -> None:
    """The source of one shard has changed; the other shard is repaired."""
    first, second = locate(copy, 0, HR), locate(copy, 2, HR)
    for path, offset in (first, second):
        damage(path, offset)
    before = first[0].read_bytes()
    write_image(sources / "b.png", photograph(131, 97, seed=5))
    result = verify(copy, "--source", sources, "--repair")
    assert result.exit_code == 1
    assert f"{first[0]}: not repaired: {sources}/b.png: changed since the build" in result.stdout
    assert f"{second[0]}: repaired" in result.stdout
    assert first[0].read_bytes() == before
    assert {path.name for path in copy.iterdir()} == {path.name for path in dataset.iterdir()}


def test_rebuilt_shard_must_have_the_recorded_digest(copy: Path, dataset: Path, folder: Path) -> None:
    """The index records what the sources do not give (say, another version's LR): nothing is replaced."""
    index = read_index(copy)
    made = replace(index.lr, border="replicate")
    (copy / "index.json").write_bytes(dump_index(replace(index, lr=made)))
    path, offset = locate(copy, 0, HR)
    damage(path, offset)
    before = path.read_bytes()
    result = verify(copy, "--source", folder, "--repair")
    assert result.exit_code == 1
    assert f"{path}: not repaired: rebuilt from its sources: expected sha256 {index.shards[0].sha256}" in result.stdout
    assert path.read_bytes() == before
    assert {path.name for path in copy.iterdir()} == {path.name for path in dataset.iterdir()}


def test_interrupted_or_killed_repair(copy: Path, dataset: Path, folder: Path) -> None:
    """The damaged shard stays until the new one is complete; leftovers are not used, and are removed next time."""
    path, offset = locate(copy, 0, HR)
    damage(path, offset)
    before = path.read_bytes()
    (copy / "shard-00000.h5.part").write_bytes(b"of an unfinished build")
    (copy / "repair.part").mkdir()
    (copy / "repair.part" / f"{path.name}.part").write_bytes(b"of a repair that was killed")
    index = read_index(copy)

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair_shards(copy, index, SourceImages((folder,)), [0], 1, interrupt)
    assert path.read_bytes() == before
    assert not (copy / "repair.part").exists()
    assert verify(copy, "--source", folder, "--repair").exit_code == 0
    assert path.read_bytes() == (dataset / path.name).read_bytes()
    assert (copy / "shard-00000.h5.part").read_bytes() == b"of an unfinished build"


def test_repair_that_cannot_write(copy: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, offset = locate(copy, 0, HR)
    damage(path, offset)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("prep.verify.repair.build_shard", full)
    result = verify(copy, "--source", folder, "--repair")
    assert result.exit_code == 1
    assert f"{path}: not repaired: it could not be written: No space left on device" in result.stdout
    monkeypatch.setattr(Path, "mkdir", full)
    result = verify(copy, "--source", folder, "--repair")
    assert result.exit_code == 1
    assert f"{copy}: could not be written: No space left on device" in result.stderr
    assert path.read_bytes() == before


def test_one_repair_or_build_at_a_time(copy: Path, folder: Path) -> None:
    """Repairs take the lock of builds. It belongs to a process, so another process has to hold it here."""
    path, offset = locate(copy, 0, HR)
    damage(path, offset)
    code = (
        "import sys\nfrom pathlib import Path\nfrom prep.workspace.workspace import Workspace\n"
        f"with Workspace(Path({str(copy)!r})).locked(print):\n    print('taken', flush=True)\n    sys.stdin.read()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "taken\n"
        result = verify(copy, "--source", folder, "--repair")
        holder.communicate()
    assert result.exit_code == 1
    assert "expected no other build at work there" in result.stderr
    assert verify(copy, "--source", folder, "--repair").exit_code == 0


def test_usage_errors(dataset: Path, tmp_path: Path) -> None:
    assert verify(dataset, "--repair").exit_code == 2
    assert verify(dataset, "--lr", tmp_path).exit_code == 2
    assert verify(dataset, "--source", tmp_path / "none").exit_code == 2
    assert verify(dataset, "--quick", "--source", tmp_path).exit_code == 2
    assert verify(dataset, "--workers", 0).exit_code == 2
    result = verify(tmp_path)
    assert result.exit_code == 1
    assert "expected a dataset, a folder with index.json, got none there" in result.stderr


def test_blocks_cover_a_shard_without_splitting_tiles(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = read_index(dataset)
    sizes = {scale: plane.tile**2 * 3 for scale, plane in index.planes.items()} | {GAP: 1}
    for limit in (1, 5000, 64 * 64 * 3, 40_000, 1 << 20):
        monkeypatch.setattr("prep.shard.checksums.BLOCK", limit)
        for number, shard in enumerate(index.shards):
            whole = segments(index, number)
            at = 0
            for block in blocks(whole, sizes):
                assert len(block) == 1 or block[-1].stop - block[0].start <= limit
                for piece in block:
                    assert piece.start == at
                    assert piece.segment.start <= piece.start < piece.stop <= piece.segment.stop
                    assert (piece.start - piece.segment.start) % sizes[piece.segment.level] == 0
                    at = piece.stop
            assert at == shard.bytes
            assert check_shard(dataset, index, number, lambda: None) == []


def test_is_padded_for_some_tiles_of_an_image() -> None:
    """Compare with a direct implementation, for random ranges of tiles."""
    rng = np.random.default_rng(0)
    side, height, width = 16, 40, 37
    rows, cols = 3, 3
    whole = np.zeros((rows * side, cols * side, 3), np.uint8)
    outside = np.ones(whole.shape, bool)
    outside[:height, :width] = False
    for _ in range(60):
        image = whole.copy()
        image[:height, :width] = 1
        spots = np.argwhere(outside)[rng.integers(0, outside.sum(), rng.integers(0, 2))]
        image[tuple(spots.T)] = 1
        cut = image.reshape(rows, side, cols, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        beyond = outside.reshape(rows, side, cols, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        first = int(rng.integers(0, 9))
        last = int(rng.integers(first, 9)) + 1
        assert is_padded(cut[first:last], first, height, width) == (not cut[first:last][beyond[first:last]].any())


def test_interrupt_stops_the_threads(dataset: Path) -> None:
    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    index = read_index(dataset)
    with pytest.raises(KeyboardInterrupt):
        check_shards(dataset, index, range(3), 2, False, interrupt)


def test_segments_without_images(dataset: Path) -> None:
    """A shard that no image refers to is one gap."""
    index = read_index(dataset)
    empty = replace(index, shard=np.zeros_like(index.shard))
    assert segments(empty, 2) == [Segment(0, index.shards[2].bytes, -1, GAP)]


def test_results_are_in_order() -> None:
    found = _in_threads(lambda n, tick: [n, -n], range(50), 4, lambda done: None)
    assert found == [sign * n for n in range(50) for sign in (1, -1)]
