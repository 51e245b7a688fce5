"""Random changes to manifests, records, lists of skipped images and HDF5 links: refused, or accepted only if true.

As in tests/test_fuzz.py, input n of a seed is always the same, and `make fuzz` takes minutes.
"""

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from fuzzing import EDGES, change_json, fuzz, mutated, refused
from helpers import build, make_plan, photograph, write_image

from loader.errors import FormatError
from loader.format.index import read_index
from prep.plan.dataset import DatasetPlan
from prep.plan.manifest import Manifest, differences
from prep.sealed import seal
from prep.shard.hdf5 import check_hdf5
from prep.workspace.record_file import parse_record
from prep.workspace.skipped import LIMIT
from prep.workspace.state import Unfinished
from prep.workspace.workspace import Workspace

WORDS = [*EDGES, b'"', b"[", b"{", b"]", b"}", b",", b":", b"-", b"1e9", b"9" * 5000, b"[" * 3000, b"\\u0000",
         b"null", b"NaN", b"\xff", b'"../x"', b"true", b'"HR"', b'"\\ud800"', b"9223372036854775807"]  # fmt: skip
Stopped = tuple[Workspace, DatasetPlan]


@pytest.fixture(scope="module", params=["hdf5", "raw"])
def stopped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """The workspace of a build interrupted with two shards of two images finished, and its plan."""
    place = tmp_path_factory.mktemp("stopped")
    for i in range(6):
        write_image(place / f"in/{i}.png", photograph(40 + i, 50, i))
    (place / "in/3.png").write_bytes(b"no image")

    def report(done: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"container": request.param, "tile": 16, "images_per_shard": 2}
    with pytest.raises(KeyboardInterrupt):
        build(place / "in", place / "out", skip_bad=True, report=report, **options)
    return Workspace(place / "out"), make_plan(place / "in", place / "out", **options)


def sealed(body: bytes) -> bytes:
    return body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n"


def changed(text: bytes, rng: random.Random) -> bytes:
    """Return JSON with changed values or bytes, mostly with a valid digest."""
    body = text.splitlines()[0]
    if rng.random() < 0.3:
        return mutated(text, rng, WORDS) if rng.random() < 0.2 else sealed(mutated(body, rng, WORDS))
    top = json.loads(body)
    for _ in range(rng.choice([1, 1, 2, 4])):
        if top:
            change_json(top, rng)
    return sealed(json.dumps(top).encode())


def test_records(stopped: Stopped, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A record that is accepted says what was recorded; all others are ignored."""
    workspace, plan = stopped
    honest = [workspace.find(plan, shard) for shard in plan.shards[:2]]
    assert all(honest)
    paths = [workspace.record(shard.file) for shard in plan.shards[:2]]
    texts = [path.read_bytes() for path in paths]

    def make(rng: random.Random) -> tuple[int, bytes]:
        number = rng.randrange(2)
        return number, changed(texts[number], rng)

    def attempt(given: tuple[int, bytes]) -> str:
        number, text = given
        paths[number].write_bytes(text)
        try:
            found = workspace.find(plan, plan.shards[number])
        finally:
            paths[number].write_bytes(texts[number])
        try:
            parse_record(text, "record")
        except FormatError as error:
            assert found is None
            return refused(error, "record")
        if found is None:
            return "ignored"
        record = honest[number]
        assert record is not None
        # Only the reason for skipping an image is free; everything else follows from the shard and the plan.
        assert [image.image for image in found.skipped] == [image.image for image in record.skipped]
        assert [image.name for image in found.images] == [image.name for image in record.images]
        assert found.shard == record.shard
        assert [{s: (r.offset, r.crc32, r.source) for s, r in image.runs.items()} for image in found.images] == [
            {s: (r.offset, r.crc32, r.source) for s, r in image.runs.items()} for image in record.images
        ]
        return "accepted"

    outcomes = fuzz(f"records ({plan.recipe.container})", make, attempt, capfd)
    assert outcomes["refused"]
    assert outcomes["ignored"]


def test_manifests(stopped: Stopped, capfd: pytest.CaptureFixture[str]) -> None:
    workspace, plan = stopped
    manifest, where = plan.manifest, workspace.manifest.name
    text = workspace.manifest.read_bytes()
    assert workspace.state(manifest) == Unfinished()
    assert Manifest.parse(text, where) == manifest

    def attempt(given: bytes) -> str:
        try:
            found = Manifest.parse(given, where)
        except FormatError as error:
            return refused(error, where)
        assert all(line.isprintable() and len(line) < 2500 for line in differences(manifest, found, versions=True))
        return "accepted"

    assert fuzz("manifests", lambda rng: changed(text, rng), attempt, capfd)["refused"]


def test_skipped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    entries = [{"image": f"{i}", "source": f"in/{i}.png", "reason": "expected an image, got none"} for i in range(3)]
    workspace = Workspace(tmp_path)
    path = workspace.skipped

    def make(rng: random.Random) -> bytes:
        top = {"entries": json.loads(json.dumps(entries))}
        change_json(top, rng)
        text = json.dumps(top.get("entries")).encode()
        return mutated(text, rng, WORDS) if rng.random() < 0.5 else text

    def attempt(given: bytes) -> str:
        path.write_bytes(given)
        try:
            found = workspace.read_skipped()
        except FormatError as error:
            return refused(error, str(path))
        assert all(type(value) is str for bad in found for value in vars(bad).values())
        assert all(not bad.source.startswith("/") and ".." not in bad.source.split("/") for bad in found)
        return "accepted" if found else "refused"

    outcomes = fuzz("skipped.json", make, attempt, capfd)
    assert outcomes["accepted"]
    assert outcomes["refused"]
    with path.open("wb") as file:
        file.truncate(LIMIT + 1)
    try:
        assert workspace.read_skipped() == []
    except FormatError as error:
        refused(error, str(path))


def test_hdf5_links(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Names in a shard replaced by links and objects of every kind: reported, and nothing else is opened."""
    for i in range(4):
        write_image(tmp_path / f"in/{i}.png", photograph(20, 20, i))
    data = build(tmp_path / "in", tmp_path / "out", images_per_shard=30, tile=16)
    index = read_index(data)
    path, whole = data / index.shards[0].file, tmp_path / "whole"
    shutil.copyfile(path, whole)
    with h5py.File(tmp_path / "other.h5", "w") as other:
        for plane in ("HR", "LR_bicubic/X2", "LR_bicubic/X4"):
            for i in range(4):
                other[f"{plane}/{i}"] = np.zeros((7, 7), np.uint8)
    names = ["HR", "LR_bicubic", "LR_bicubic/X2", *(f"{plane}/{i}" for plane in ("HR", "LR_bicubic/X4") for i in "012")]

    def attempt(rng: random.Random) -> str:
        shutil.copyfile(whole, path)
        name = rng.choice(names)
        kind = rng.choice(["soft", "cycle", "external", "own name", "virtual", "stored", "type", "group", "hard"])
        with h5py.File(path, "r+") as file:
            del file[name]
            match kind:
                case "soft":
                    file[name] = h5py.SoftLink("/" + rng.choice(names))
                case "cycle":
                    file[name] = h5py.SoftLink("/" + name)
                case "external":
                    file[name] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/" + name)
                case "own name":
                    file[name] = h5py.ExternalLink(path.name, "/" + rng.choice(names))
                case "virtual":
                    layout = h5py.VirtualLayout((20, 20, 3), np.uint8)
                    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "/HR/0", (20, 20, 3))
                    file.create_virtual_dataset(name, layout)
                case "stored":
                    place = [(str(tmp_path / "other.h5"), 0, 1200)]
                    file.create_dataset(name, (20, 20, 3), np.uint8, external=place)
                case "type":
                    file[name] = np.dtype(np.uint8)
                case "group":
                    file.create_group(name)
                case _:
                    file[name] = file["/"]
        findings = list(check_hdf5(data, index, 0))
        assert findings, (name, kind)
        assert all("(7, 7" not in finding.text for finding in findings)
        return kind

    outcomes = fuzz("HDF5 links", lambda rng: rng, attempt, capfd)
    assert sum(outcomes.values()) >= 20


def test_dump_and_parse_agree(stopped: Stopped) -> None:
    workspace, plan = stopped
    for shard in plan.shards[:2]:
        text = workspace.record(shard.file).read_bytes()
        assert seal(json.loads(text.splitlines()[0])) == text
