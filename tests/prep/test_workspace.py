"""The workspace: the state of a dataset folder through the life of a build, and which files belong to it."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers import build, make_plan

from prep.plan.dataset import DatasetPlan
from prep.sealed import seal
from prep.workspace.state import Complete, Empty, Orphaned, Other, Unfinished
from prep.workspace.workspace import Workspace


@pytest.fixture
def plan(folder: Path, tmp_path: Path) -> DatasetPlan:
    """A plan of three shards, in an empty folder."""
    (tmp_path / "out").mkdir()
    return make_plan(folder, tmp_path / "out")


def other(plan: DatasetPlan) -> DatasetPlan:
    """Return the same plan with another tile size."""
    return DatasetPlan(plan.folder, replace(plan.recipe, tile=32), plan.shards)


def names(workspace: Workspace) -> set[str]:
    return {path.name for path in workspace.folder.iterdir()}


def test_states_of_a_build(plan: DatasetPlan, folder: Path) -> None:
    workspace, manifest = Workspace(plan.folder), plan.manifest
    assert workspace.state(manifest) == Empty()
    workspace.begin(manifest)
    assert workspace.state(manifest) == Unfinished()
    assert workspace.state(other(plan).manifest) == Other(manifest)
    workspace.manifest.write_bytes(seal({"made_by": "me"}))
    assert workspace.state(manifest) == Other(None)
    workspace.abandon()
    assert workspace.state(manifest) == Empty()
    assert names(workspace) == set()

    build(folder, plan.folder)
    assert workspace.is_settled()
    assert workspace.state(manifest) == Complete(other_build=False)
    workspace.begin(other(plan).manifest)
    assert not workspace.is_settled()
    assert workspace.state(manifest) == Complete(other_build=True)
    assert workspace.state(other(plan).manifest) == Unfinished()
    workspace.abandon()
    assert workspace.is_settled()
    workspace.index.unlink()
    assert workspace.state(manifest) == Orphaned(plan.shards[0].file)


def test_a_locked_folder_is_not_settled(plan: DatasetPlan, folder: Path) -> None:
    workspace = Workspace(build(folder, plan.folder))
    with workspace.locked(print):
        assert not workspace.is_settled()
    assert workspace.is_settled()


@pytest.mark.parametrize("complete", [True, False])
def test_only_files_of_a_build_are_removed(plan: DatasetPlan, folder: Path, complete: bool) -> None:
    workspace = Workspace(plan.folder)
    first, second, _ = (shard.file for shard in plan.shards)
    if complete:
        build(folder, plan.folder)
    dataset = names(workspace)
    foreign = {"notes.txt", "shard-1.h5", "shard-00001.h5.bak", "shard-00001.json", "other.json.part", "scores-a.bin"}
    for name in foreign:
        (plan.folder / name).touch()
    leftovers = [
        *(path for file in (first, second) for path in (workspace.staged(file), workspace.record(file))),
        workspace.staged(workspace.record(first).name),
        *(workspace.staged(path.name) for path in (workspace.index, workspace.skipped, workspace.manifest)),
    ]
    for path in [*leftovers, workspace.manifest, *(() if complete else (workspace.shard(second),))]:
        path.touch()
    workspace.clean({first})
    kept = {workspace.staged(first).name, workspace.record(first).name, workspace.manifest.name}
    assert names(workspace) == dataset | foreign | kept
    workspace.abandon()
    assert names(workspace) == dataset | foreign


def test_a_shard_keeps_its_staged_name_beside_a_dataset(plan: DatasetPlan, folder: Path) -> None:
    """Its final name belongs to the dataset until the commit."""
    workspace = Workspace(build(folder, plan.folder))
    shard, changed = plan.shards[0], other(plan)
    before = workspace.shard(shard.file).read_bytes()

    def stop(done: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(folder, plan.folder, overwrite=True, tile=32, report=stop)
    assert workspace.state(changed.manifest) == Unfinished()
    record = workspace.find(changed, shard)
    assert record is not None
    assert workspace.staged(shard.file).exists()
    assert workspace.shard(shard.file).read_bytes() == before
    assert workspace.find(plan, shard) is None
