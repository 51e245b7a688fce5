"""Datasets with skipped images: every command lists them, and --retry-skipped retries them."""

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from helpers import Build, digests, make_plan, photograph, write_image
from helpers import build as typed_build

from loader.errors import FormatError, ShardsError
from loader.format.index import read_index
from prep.build.build import build_dataset
from prep.cli import main
from prep.workspace.workspace import Workspace

build: Build = typed_build


def prep(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def source(folder: Path, tmp_path: Path) -> Path:
    """The small folder of images and two bad ones."""
    place = Path(shutil.copytree(folder, tmp_path / "in"))
    (place / "bad.png").write_text("no image")
    (place / "worse.png").write_text("no image")
    return place


def retry(source: Path, out: Path, notes: list[str], **options: object) -> list[str]:
    """Retry skipped images in a dataset of two images per shard; return the sources of those skipped again."""
    report = options.pop("report", lambda done: None)
    summary = build_dataset(
        make_plan(source, out), 1, skip_bad=False, overwrite=False, retry=True, note=notes.append, report=report,  # type: ignore[arg-type]
    )  # fmt: skip
    return [bad.source for bad in summary.skipped]


def test_skipped_images_are_listed_by_every_command(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("build-shards", source, "--scale", 2, "--out", out, "--workers", 1)
    for _ in range(2):  # the second run finds it complete
        result = prep(*command, "--on-error", "skip")
        assert result.exit_code == 3
        assert "skipped 2 images (also listed in skipped.json; --retry-skipped retries them):" in result.output
        assert f"{source}/bad.png: expected PNG" in result.output
    assert "already complete" in result.output
    result = prep(*command)
    assert result.exit_code == 1
    assert "got one without 2 skipped images (--retry-skipped retries them" in result.output
    text = prep("info", out).output
    assert "skipped   2 images" in text
    assert "bad.png: expected PNG" in text
    facts = json.loads(prep("info", out, "--json").output)
    assert [bad["source"] for bad in facts["left_out"]] == ["bad.png", "worse.png"]
    assert prep("verify", out).output.endswith("; 2 images were skipped when it was built, see skipped.json\n")


def test_images_that_are_still_bad(source: Path, tmp_path: Path) -> None:
    out = build(source, tmp_path / "out", skip_bad=True)
    before, notes = digests(out), list[str]()
    assert retry(source, out, notes) == ["bad.png", "worse.png"]
    assert digests(out) == before
    assert any("2 images skipped before are still unusable; nothing has changed" in note for note in notes)


def test_mended_images(source: Path, tmp_path: Path) -> None:
    """Only their shards are rebuilt; the result equals a build without bad images."""
    out = build(source, tmp_path / "out", skip_bad=True)
    kept = (out / "shard-00000.h5").stat().st_ino
    write_image(source / "bad.png", photograph(80, 90))
    notes: list[str] = []
    assert retry(source, out, notes) == ["worse.png"]
    assert any("1 of 2 images skipped before are usable now" in note for note in notes)
    assert digests(out) == digests(build(source, tmp_path / "undisturbed", skip_bad=True))
    assert kept == (out / "shard-00000.h5").stat().st_ino
    write_image(source / "worse.png", photograph(80, 90))
    assert retry(source, out, notes) == []
    assert digests(out) == digests(build(source, tmp_path / "whole"))
    assert not (out / "skipped.json").exists()
    assert retry(source, out, notes) == []  # nothing to retry: the dataset is checked


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_retry_resumes(source: Path, tmp_path: Path, stop: int) -> None:
    """The old dataset stays intact meanwhile; the same command ends with the bytes of an uninterrupted retry."""
    out = build(source, tmp_path / "out", skip_bad=True)
    before = digests(out)
    write_image(source / "bad.png", photograph(80, 90))
    calls: list[int] = []

    def interrupt(done: int) -> None:
        calls.append(done)
        if len(calls) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retry(source, out, [], report=interrupt)
    assert before.items() <= digests(out).items()
    assert list(read_index(out).name) == ["a", "b", "c", "d e", "ü"]
    assert retry(source, out, []) == ["worse.png"]
    assert digests(out) == digests(build(source, tmp_path / "undisturbed", skip_bad=True))


def test_retry_in_an_unfinished_build(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def interrupt(done: int) -> None:
        if done >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(source, out, skip_bad=True, report=interrupt)
    write_image(source / "bad.png", photograph(80, 90))
    os.utime(source / "bad.png", ns=(1, 1))
    assert retry(source, out, []) == ["worse.png"]
    assert "bad" in read_index(out).name


def test_another_dataset_is_not_touched(source: Path, tmp_path: Path) -> None:
    out = build(source, tmp_path / "out", skip_bad=True)
    before = digests(out)
    write_image(source / "new.png", photograph(80, 90))
    with pytest.raises(ShardsError, match=r"1 added \(new.png\)"):
        retry(source, out, [])
    assert digests(out) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "expected a list"),
        ("[1]", "expected an object"),
        ('[{"image": "a", "source": "a.png"}]', "reason"),
        ('[{"image": "a", "source": "a.png", "reason": 5}]', "reason"),
        ('[{"image": "a", "source": "a.png", "reason": "x", "more": 1}]', "no others"),
        ("[" * 200_000, "expected a JSON object"),
        ('[{"image": "\\ud800", "source": "a.png", "reason": "x"}]', "UTF-8"),
        ("\x00" * (17 << 20), "more than"),
    ],
)
def test_malformed_lists_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "skipped.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        Workspace(tmp_path).read_skipped()
    assert "cannot be read" in Workspace(tmp_path).describe_skipped()


def test_a_list_that_is_not_a_file(tmp_path: Path) -> None:
    assert Workspace(tmp_path).read_skipped() == []
    assert Workspace(tmp_path).describe_skipped() == ""
    os.mkfifo(tmp_path / "skipped.json")
    with pytest.raises(FormatError, match="got a pipe, not a regular file"):
        Workspace(tmp_path).read_skipped()


def test_names_in_a_list_are_printed_escaped(source: Path, tmp_path: Path) -> None:
    out = build(source, tmp_path / "out", skip_bad=True)
    entry = {"image": "x", "source": "\x1b]0;owned\x07.png", "reason": "a\nb"}
    (out / "skipped.json").write_text(json.dumps([entry]))
    for command in (("info", out), ("build-shards", source, "--scale", 2, "--out", out)):
        output = prep(*command).output
        assert "\x1b" not in output
        assert "\x07" not in output
