"""Resuming: the same command completes an interrupted build to the same bytes; another command is refused."""

import json
import os
import re
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from helpers import Build, digests, make_plan, photograph, write_image
from helpers import build as typed_build

import prep.build.check
import prep.plan.dataset
from loader.errors import ShardsError
from loader.format.index import read_index
from prep.build.build import Summary, build_dataset
from prep.sealed import seal
from prep.workspace.workspace import PART, RECORD, Workspace

build: Build = typed_build


@pytest.fixture
def images(folder: Path, tmp_path: Path) -> Path:
    """A copy of the images, for a test to change."""
    return Path(shutil.copytree(folder, tmp_path / "images"))


@pytest.fixture(params=["hdf5", "raw"])
def one_each(request: pytest.FixtureRequest) -> Build:
    """`build` with one image per shard, in each container."""

    def run(source: Path, out: Path, **changes: object) -> Path:
        return build(source, out, **({"container": request.param, "images_per_shard": 1} | changes))

    return run


def stop_after(images: int) -> Callable[[int], None]:
    """Return a report callback that interrupts the build."""

    def report(done: int) -> None:
        if done == images:
            raise KeyboardInterrupt

    return report


def unfinished(run: Build, source: Path, out: Path, images: int = 4, **changes: object) -> Path:
    """Interrupt a build after so many images, with one shard fewer finished; return its folder."""
    with pytest.raises(KeyboardInterrupt):
        run(source, out, report=stop_after(images), **changes)
    return out


@pytest.mark.parametrize("workers", [1, 3])
def test_interrupted_builds_resume(one_each: Build, images: Path, tmp_path: Path, workers: int) -> None:
    expected = digests(one_each(images, tmp_path / "undisturbed"))
    out = tmp_path / "out"
    notes: list[str] = []
    done: list[int] = []
    for images_done in (1, 2, 4):
        with pytest.raises(KeyboardInterrupt):
            one_each(images, out, report=stop_after(images_done), note=notes.append)
        assert not (out / "index.json").exists()
        assert not list(tmp_path.glob(f"out/*{PART}")) + list(tmp_path.glob("out/*.lock"))
    assert notes[-1] == "3 of 5 shards are finished; run the same command to resume"
    kept = {path.name: path.stat().st_ino for path in out.glob("shard-0000?.*")}
    assert len(kept) == 6  # shards and their records
    one_each(images, out, report=done.append, workers=workers)
    assert digests(out) == expected
    assert all((out / name).stat().st_ino == inode for name, inode in kept.items() if not name.endswith(RECORD))
    assert done == sorted(done)
    assert done[-1] == 5


def replace_image(images: Path, out: Path) -> None:
    write_image(images / "b.png", photograph(131, 97, seed=9))


def touch_image(images: Path, out: Path) -> None:
    os.utime(images / "b.png", (0, 0))


def flip_a_byte(images: Path, out: Path) -> None:
    (path,) = (path for path in out.glob("shard-00001.*") if path.suffix != RECORD)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(images: Path, out: Path) -> None:
    (path,) = (path for path in out.glob("shard-00001.*") if path.suffix != RECORD)
    os.truncate(path, 5000)


def remove_shard(images: Path, out: Path) -> None:
    (path,) = (path for path in out.glob("shard-00001.*") if path.suffix != RECORD)
    path.unlink()


def remove_record(images: Path, out: Path) -> None:
    next(out.glob("shard-00001.*.json")).unlink()


def corrupt_record(images: Path, out: Path) -> None:
    path = next(out.glob("shard-00001.*.json"))
    path.write_text(path.read_text().replace("131", "130"))


def foreign_record(images: Path, out: Path) -> None:
    """Make the record another build's, with a valid digest."""
    path = next(out.glob("shard-00001.*.json"))
    path.write_bytes(seal(json.loads(path.read_bytes().splitlines()[0]) | {"build": "0" * 64}))


@pytest.mark.parametrize(
    "change",
    [
        replace_image,
        touch_image,
        flip_a_byte,
        cut,
        remove_shard,
        remove_record,
        corrupt_record,
        foreign_record,
    ],
)
def test_a_shard_is_rebuilt_if_it_or_its_sources_changed(
    one_each: Build, images: Path, tmp_path: Path, change: Callable[[Path, Path], None]
) -> None:
    out = unfinished(one_each, images, tmp_path / "out")
    change(images, out)
    expected = digests(one_each(images, tmp_path / "undisturbed"))
    notes: list[str] = []
    one_each(images, out, note=notes.append)
    assert notes == [f"{out}: 2 of 5 shards are already finished; all checksums match"]
    assert digests(out) == expected


DIFFERENT: list[tuple[dict[str, object], str]] = [
    ({"scales": (2,)}, "scale: found 2, 4; requested 2"),
    ({"container": "raw"}, "format: found hdf5; requested raw"),
    ({"tile": 32}, "tile: found 64; requested 32"),
    ({"images_per_shard": 3}, "images per shard: found 1; requested 3"),
    (
        {"resize": "matlab-double"},
        "LR: found matlab-uint8 with symmetric border; requested matlab-double with symmetric border",
    ),
    (
        {"border": "replicate"},
        "LR: found matlab-uint8 with symmetric border; requested matlab-uint8 with replicate border",
    ),
    ({"lr": "lr"}, "LR: found matlab-uint8 with symmetric border; requested given"),
]


@pytest.mark.parametrize("complete", [True, False])
def test_another_command_is_refused_with_the_differences(images: Path, tmp_path: Path, complete: bool) -> None:
    def one(source: Path, out: Path, **changes: object) -> Path:
        return build(source, out, **({"images_per_shard": 1} | changes))

    out = one(images, tmp_path / "out") if complete else unfinished(one, images, tmp_path / "out")
    before = digests(out)
    for path in images.iterdir():
        for scale in (2, 4):
            height, width = (n // scale for n in PICTURES[path.stem])
            write_image(tmp_path / f"lr/X{scale}/{path.stem}x{scale}.png", photograph(height, width))
    for changes, message in DIFFERENT:
        if "lr" in changes:
            changes = {"lr": tmp_path / "lr"}
        with pytest.raises(ShardsError, match=re.escape(message)) as caught:
            one(images, out, **changes)
        assert str(caught.value).count("\n") == 1
        assert "--overwrite" in str(caught.value)
    write_image(images / "e.png", photograph(64, 64))
    write_image(images / "f.png", photograph(64, 64))
    (images / "c.png").unlink()
    with pytest.raises(ShardsError, match=r"HR sources: 2 added \(e.png, f.png\)\n  HR sources: 1 removed \(c.png\)"):
        one(images, out)
    assert digests(out) == before
    one(images, out, overwrite=True)
    assert digests(out) == digests(one(images, tmp_path / "undisturbed"))


PICTURES = {"a": (128, 192), "b": (131, 97), "c": (64, 64), "d e": (65, 300), "ü": (200, 71)}


def test_resuming_with_given_lr_checks_its_files(one_each: Build, images: Path, tmp_path: Path) -> None:
    def give(name: str, seed: int) -> None:
        height, width = (n // 2 for n in PICTURES[name])
        write_image(tmp_path / f"lr/{name}x2.png", photograph(height, width, seed))

    for name in PICTURES:
        give(name, 0)
    options: dict[str, Any] = {"lr": tmp_path / "lr", "scales": (2,)}
    out = unfinished(one_each, images, tmp_path / "out", **options)
    give("b", 1)
    notes: list[str] = []
    one_each(images, out, note=notes.append, **options)
    assert notes == [f"{out}: 2 of 5 shards are already finished; all checksums match"]
    assert digests(out) == digests(one_each(images, tmp_path / "undisturbed", **options))
    options |= {"resize": "matlab-double", "border": "replicate"}  # irrelevant for given LR
    one_each(images, out, note=notes.append, **options)
    assert notes[1:] == []
    with pytest.raises(ShardsError, match="LR: found given; requested matlab-uint8 with symmetric border"):
        one_each(images, out, scales=(2,))


def test_another_version_cannot_resume_a_build_but_accepts_a_dataset(
    one_each: Build, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = unfinished(one_each, images, tmp_path / "out"), one_each(images, tmp_path / "whole")
    monkeypatch.setattr(prep.plan.dataset, "MADE_BY", "srshards 9.9")
    with pytest.raises(ShardsError, match=r"made by: found srshards .*; requested srshards 9.9"):
        one_each(images, out)
    monkeypatch.setattr(prep.build.check, "MADE_BY", "srshards 9.9")
    notes: list[str] = []
    one_each(images, whole, note=notes.append)
    assert re.fullmatch(r".*: made by srshards .*; this is srshards 9.9", notes[-1])


def test_a_shard_stopped_by_a_bad_image_elsewhere_is_rebuilt(one_each: Build, tmp_path: Path) -> None:
    """A worker reaches a bad image after one shard is finished, while another decodes the only image of its shard."""
    images = tmp_path / "images"
    for name, size in (("0", (50, 40)), ("1", (400, 500)), ("2", (2000, 1500))):
        write_image(images / f"{name}.png", photograph(*size))
    whole = (images / "1.png").read_bytes()
    (images / "1.png").write_bytes(whole[:-1000])
    with pytest.raises(ShardsError, match=r"(?s)1.png: expected"):
        one_each(images, tmp_path / "out", workers=3)
    (images / "1.png").write_bytes(whole)
    one_each(images, tmp_path / "out", workers=3)
    assert digests(tmp_path / "out") == digests(one_each(images, tmp_path / "undisturbed"))


def test_a_damaged_manifest_is_refused(one_each: Build, images: Path, tmp_path: Path) -> None:
    out = unfinished(one_each, images, tmp_path / "out")
    manifest = Workspace(out).manifest
    manifest.write_text(manifest.read_text().replace("64", "32"))
    with pytest.raises(ShardsError, match="build.json: damaged"):
        one_each(images, out)
    one_each(images, out, overwrite=True)
    assert digests(out) == digests(one_each(images, tmp_path / "undisturbed"))


def test_shards_without_index_are_not_deleted(one_each: Build, images: Path, tmp_path: Path) -> None:
    out = one_each(images, tmp_path / "out")
    expected = digests(out)
    (out / "index.json").unlink()
    with pytest.raises(ShardsError, match=r"got shard-00000\.\w+ without index.json \(--overwrite"):
        one_each(images, out)
    one_each(images, out, overwrite=True)
    assert digests(out) == expected


def summary(images: Path, out: Path, *, skip_bad: bool = False, **changes: Any) -> Summary:
    plan = make_plan(images, out, container="raw", **changes)
    return build_dataset(plan, 2, skip_bad=skip_bad, overwrite=False, report=lambda done: None)


def test_a_complete_dataset_is_checked(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not summary(images, out).checked
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    out.chmod(0o555)
    again = summary(images, out)
    assert again.checked
    assert again.index.sha256 == read_index(out).sha256
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    out.chmod(0o755)
    assert summary(images, out, images_per_shard=2, max_pixels=1 << 27).checked
    shard = out / "shard-00001.raw"
    data = bytearray(shard.read_bytes())
    data[123] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardsError, match=r"damaged .*\n.*shard-00001.raw: its bytes differ from the index"):
        summary(images, out)


def test_skipped_images_are_recorded(images: Path, tmp_path: Path) -> None:
    (images / "bad.png").write_text("no image")
    (images / "worse.png").write_text("no image")
    expected = digests(build(images, tmp_path / "undisturbed", skip_bad=True, images_per_shard=1))
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        build(images, out, skip_bad=True, images_per_shard=1, report=stop_after(4))
    build(images, out, skip_bad=True, images_per_shard=1)
    assert digests(out) == expected
    assert [entry["source"] for entry in json.loads((out / "skipped.json").read_text())] == ["bad.png", "worse.png"]
    plan = make_plan(images, out, images_per_shard=1)
    again = build_dataset(plan, 1, skip_bad=True, overwrite=False, report=lambda done: None)
    assert again.checked
    assert [bad.source for bad in again.skipped] == ["bad.png", "worse.png"]
    with pytest.raises(ShardsError, match=r"(?s)without 2 skipped images .*/bad.png: .*/worse.png: "):
        build(images, out, images_per_shard=1)


def test_skipped_images_do_not_hide_another_layout(images: Path, tmp_path: Path) -> None:
    """Shards planned for 3 images, one of them bad, differ from shards planned for 2."""
    write_image(images / "b.png", photograph(3, 3))
    out = build(images, tmp_path / "out", skip_bad=True, images_per_shard=3)
    with pytest.raises(ShardsError, match="images per shard: found 3; requested 2"):
        build(images, out, skip_bad=True, images_per_shard=2)
    build(images, out, skip_bad=True, images_per_shard=3)


def test_resuming_without_skipping_or_with_another_limit(images: Path, tmp_path: Path) -> None:
    """Images skipped under other rules are tried again."""
    out = tmp_path / "out"
    recipe: dict[str, object] = {"images_per_shard": 1}

    def stopped(limit: int) -> None:
        with pytest.raises(KeyboardInterrupt):
            build(images, out, skip_bad=True, report=stop_after(4), max_pixels=limit, **recipe)

    stopped(10_000)  # a and b are larger, c is not
    assert (out / "shard-00002.h5").exists()
    with pytest.raises(ShardsError, match=r"(?s)a.png: expected at most 10000 pixels.*1 of 5 shards are finished"):
        build(images, out, max_pixels=10_000, **recipe)
    stopped(10_000)
    build(images, out, skip_bad=True, **recipe)
    assert digests(out) == digests(build(images, tmp_path / "undisturbed", **recipe))
    shutil.rmtree(out)
    stopped(1 << 28)
    build(images, out, skip_bad=True, max_pixels=10_000, **recipe)
    expected = digests(build(images, tmp_path / "small", skip_bad=True, max_pixels=10_000, **recipe))
    assert digests(out) == expected


def test_an_earlier_dataset_stays_intact_until_the_new_one_is_complete(
    one_each: Build, images: Path, tmp_path: Path
) -> None:
    out = one_each(images, tmp_path / "out", border="replicate")
    before = digests(out)
    expected = digests(one_each(images, tmp_path / "undisturbed"))
    for done in (3, 5):
        unfinished(one_each, images, out, done, overwrite=True)
        assert before.items() <= digests(out).items()
        notes: list[str] = []
        one_each(images, out, border="replicate", note=notes.append)  # the earlier dataset still passes its check
        assert notes == [f"{out}: there is also an unfinished build of another dataset"]
    one_each(images, out, overwrite=True, note=notes.append)
    assert notes[1:] == [f"{out}: 4 of 5 shards are already finished; all checksums match"]
    assert digests(out) == expected


class Death(BaseException):
    """Stands in for the death of the process: no cleanup follows."""


def dies(stop: int, run: Callable[[], object]) -> bool:
    """Run a build, and let it die before its `stop`-th rename or removal; return whether it died."""
    counter = count()

    def mortal(change: Callable[..., object]) -> Callable[..., object]:
        def step(*args: object, **options: object) -> object:
            if next(counter) >= stop:
                raise Death
            return change(*args, **options)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "unlink", "rmdir"):
            patch.setattr(Path, name, mortal(getattr(Path, name)))
        try:
            run()
        except Death:
            return True
    return False


@pytest.mark.parametrize("earlier", [False, True])
def test_death_before_any_rename_or_removal(earlier: bool, one_each: Build, images: Path, tmp_path: Path) -> None:
    """Without any cleanup, the folder holds the new dataset, the earlier one or none, and the same command resumes."""
    for name in ("c.png", "d e.png", "ü.png"):
        (images / name).unlink()
    whole = one_each(images, tmp_path / "undisturbed")
    expected, digest = digests(whole), read_index(whole).sha256
    old = one_each(images, tmp_path / "old", border="replicate", images_per_shard=2)
    for stop in count():
        out = tmp_path / f"out{stop}"
        if earlier:
            shutil.copytree(old, out)
        died = dies(stop, lambda out=out: one_each(images, out, overwrite=earlier))  # type: ignore[misc]
        if (out / "index.json").exists():
            assert read_index(out).sha256 in (digest, read_index(old).sha256 if earlier else digest)
        if not died:
            break
        one_each(images, out, overwrite=earlier)
        assert digests(out) == expected, stop
        shutil.rmtree(out)
    assert digests(out) == expected
    assert stop > 15
