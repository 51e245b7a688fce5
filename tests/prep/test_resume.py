"""Going on: whatever stopped a build, the same command ends it as if nothing had; another command is refused."""

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
    """A copy of the images that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "images"))


@pytest.fixture(params=["hdf5", "raw"])
def one_each(request: pytest.FixtureRequest) -> Build:
    """`build`, one image to a shard, in each container."""

    def run(source: Path, out: Path, **changes: object) -> Path:
        return build(source, out, **({"container": request.param, "images_per_shard": 1} | changes))

    return run


def stop_after(images: int) -> Callable[[int], None]:
    """A report that interrupts the build."""

    def report(done: int) -> None:
        if done == images:
            raise KeyboardInterrupt

    return report


def unfinished(run: Build, source: Path, out: Path, images: int = 4, **changes: object) -> Path:
    """A folder in which a build was interrupted when it had done so many images, one shard less."""
    with pytest.raises(KeyboardInterrupt):
        run(source, out, report=stop_after(images), **changes)
    return out


@pytest.mark.parametrize("workers", [1, 3])
def test_interrupted_anywhere_and_gone_on_with(one_each: Build, images: Path, tmp_path: Path, workers: int) -> None:
    expected = digests(one_each(images, tmp_path / "undisturbed"))
    out = tmp_path / "out"
    notes: list[str] = []
    done: list[int] = []
    for images_done in (1, 2, 4):
        with pytest.raises(KeyboardInterrupt):
            one_each(images, out, report=stop_after(images_done), note=notes.append)
        assert not (out / "index.json").exists()
        assert not list(tmp_path.glob(f"out/*{PART}")) + list(tmp_path.glob("out/*.lock"))
    assert notes[-1] == "3 of 5 shards are finished; the same command goes on from there"
    kept = {path.name: path.stat().st_ino for path in out.glob("shard-0000?.*")}
    assert len(kept) == 6  # shards and records
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


def lose_shard(images: Path, out: Path) -> None:
    (path,) = (path for path in out.glob("shard-00001.*") if path.suffix != RECORD)
    path.unlink()


def lose_record(images: Path, out: Path) -> None:
    next(out.glob("shard-00001.*.json")).unlink()


def harm_record(images: Path, out: Path) -> None:
    path = next(out.glob("shard-00001.*.json"))
    path.write_text(path.read_text().replace("131", "130"))


def spoil_terms_of_record(images: Path, out: Path) -> None:
    """A record of another build, whole in itself."""
    path = next(out.glob("shard-00001.*.json"))
    path.write_bytes(seal(json.loads(path.read_bytes().splitlines()[0]) | {"build": "0" * 64}))


@pytest.mark.parametrize(
    "harm",
    [replace_image, touch_image, flip_a_byte, cut, lose_shard, lose_record, harm_record, spoil_terms_of_record],
)
def test_a_shard_that_changed_or_whose_sources_did_is_built_again(
    one_each: Build, images: Path, tmp_path: Path, harm: Callable[[Path, Path], None]
) -> None:
    out = unfinished(one_each, images, tmp_path / "out")
    harm(images, out)
    expected = digests(one_each(images, tmp_path / "undisturbed"))
    notes: list[str] = []
    one_each(images, out, note=notes.append)
    assert notes == [f"{out}: 2 of 5 shards were finished before, and are unharmed"]
    assert digests(out) == expected


DIFFERENT: list[tuple[dict[str, object], str]] = [
    ({"scales": (2,)}, "scale: 2, 4 there, 2 asked for"),
    ({"container": "raw"}, "format: hdf5 there, raw asked for"),
    ({"tile": 32}, "tile: 64 there, 32 asked for"),
    ({"images_per_shard": 3}, "images per shard: 1 there, 3 asked for"),
    ({"resize": "matlab-double"}, "LR: matlab-uint8 with symmetric border there, matlab-double with symmetric border"),
    ({"border": "replicate"}, "LR: matlab-uint8 with symmetric border there, matlab-uint8 with replicate border"),
    ({"lr": "lr"}, "LR: matlab-uint8 with symmetric border there, given asked for"),
]


@pytest.mark.parametrize("complete", [True, False])
def test_another_command_is_refused_and_differences_are_named(images: Path, tmp_path: Path, complete: bool) -> None:
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


def test_given_lr_is_gone_on_with_and_looked_at_again(one_each: Build, images: Path, tmp_path: Path) -> None:
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
    assert notes == [f"{out}: 2 of 5 shards were finished before, and are unharmed"]
    assert digests(out) == digests(one_each(images, tmp_path / "undisturbed", **options))
    one_each(images, out, note=notes.append, resize="matlab-double", border="replicate", **options)  # makes no LR
    assert notes[1:] == []
    with pytest.raises(ShardsError, match="LR: given there, matlab-uint8 with symmetric border asked for"):
        one_each(images, out, scales=(2,))


def test_an_unfinished_build_by_another_version_is_refused_a_dataset_is_not(
    one_each: Build, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = unfinished(one_each, images, tmp_path / "out"), one_each(images, tmp_path / "whole")
    monkeypatch.setattr(prep.plan.dataset, "MADE_BY", "srshards 9.9")
    with pytest.raises(ShardsError, match=r"made by: srshards .* there, srshards 9.9 asked for"):
        one_each(images, out)
    monkeypatch.setattr(prep.build.check, "MADE_BY", "srshards 9.9")
    notes: list[str] = []
    one_each(images, whole, note=notes.append)
    assert re.fullmatch(r".*: made by srshards .*; this is srshards 9.9", notes[-1])


def test_what_was_stopped_elsewhere_after_a_bad_image_is_built_again(one_each: Build, tmp_path: Path) -> None:
    """One shard is finished when a worker meets a bad image, while another has the only image of its shard in work."""
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


def test_damaged_terms_are_refused(one_each: Build, images: Path, tmp_path: Path) -> None:
    out = unfinished(one_each, images, tmp_path / "out")
    manifest = Workspace(out).manifest
    manifest.write_text(manifest.read_text().replace("64", "32"))
    with pytest.raises(ShardsError, match="build.json: damaged"):
        one_each(images, out)
    one_each(images, out, overwrite=True)
    assert digests(out) == digests(one_each(images, tmp_path / "undisturbed"))


def test_shards_that_lost_their_index_are_not_thrown_away(one_each: Build, images: Path, tmp_path: Path) -> None:
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
    with pytest.raises(ShardsError, match=r"damaged .*\n.*shard-00001.raw: other bytes than the index records"):
        summary(images, out)


def test_what_was_left_out_is_remembered(images: Path, tmp_path: Path) -> None:
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
    with pytest.raises(ShardsError, match=r"(?s)lacks 2, left out before .*/bad.png: .*/worse.png: "):
        build(images, out, images_per_shard=1)


def test_a_layout_that_left_out_images_hide(images: Path, tmp_path: Path) -> None:
    """Shards meant for 3 images, of which one is bad, are not those meant for 2."""
    write_image(images / "b.png", photograph(3, 3))
    out = build(images, tmp_path / "out", skip_bad=True, images_per_shard=3)
    with pytest.raises(ShardsError, match="images per shard: 3 there, 2 asked for"):
        build(images, out, skip_bad=True, images_per_shard=2)
    build(images, out, skip_bad=True, images_per_shard=3)


def test_going_on_without_skipping_or_with_another_limit(images: Path, tmp_path: Path) -> None:
    """What a shard left out under other rules is looked at again."""
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


def test_an_earlier_dataset_stays_whole_until_the_new_one_is(one_each: Build, images: Path, tmp_path: Path) -> None:
    out = one_each(images, tmp_path / "out", border="replicate")
    before = digests(out)
    expected = digests(one_each(images, tmp_path / "undisturbed"))
    for done in (3, 5):
        unfinished(one_each, images, out, done, overwrite=True)
        assert before.items() <= digests(out).items()
        notes: list[str] = []
        one_each(images, out, border="replicate", note=notes.append)  # the earlier one still passes its check
        assert notes == [f"{out}: beside the dataset there is an unfinished build of another"]
    one_each(images, out, overwrite=True, note=notes.append)
    assert notes[1:] == [f"{out}: 4 of 5 shards were finished before, and are unharmed"]
    assert digests(out) == expected


class Death(BaseException):
    """The end of the process, as far as files can tell."""


def dies(stop: int, build_it: Callable[[], object]) -> bool:
    """Build until just before the given change of names in the folder, then change no more of them; whether it came."""
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
            build_it()
        except Death:
            return True
    return False


@pytest.mark.parametrize("earlier", [False, True])
def test_an_end_before_any_change_of_names(earlier: bool, one_each: Build, images: Path, tmp_path: Path) -> None:
    """No tidying up follows. There is the new dataset, the earlier one or none, and the same command goes on."""
    for name in ("c.png", "d e.png", "ü.png"):
        (images / name).unlink()
    whole = one_each(images, tmp_path / "undisturbed")
    expected, digest = digests(whole), read_index(whole).sha256
    old = one_each(images, tmp_path / "old", border="replicate", images_per_shard=2)
    for stop in count():
        out = tmp_path / f"out{stop}"
        if earlier:
            shutil.copytree(old, out)
        came = dies(stop, lambda out=out: one_each(images, out, overwrite=earlier))  # type: ignore[misc]
        if (out / "index.json").exists():
            assert read_index(out).sha256 in (digest, read_index(old).sha256 if earlier else digest)
        if not came:
            break
        one_each(images, out, overwrite=earlier)
        assert digests(out) == expected, stop
        shutil.rmtree(out)
    assert digests(out) == expected
    assert stop > 15
