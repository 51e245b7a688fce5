"""What a run goes on from: its checkpoint, the settings and the place in the stream that it had, and what may change.

The first rank reads, and gives the others what it read: a folder may be another one on each machine, or seen late.
"""

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch

from loader.errors import one_line
from loader.system.safefile import read_member
from model.checkpoints import CheckpointError, read_raw
from model.training import saving
from model.training.lock import locked
from model.training.ranks import Ranks
from model.training.settings import AUTO, LOCAL, Config, flag
from model.training.settings_io import (
    SettingsError,
    changed_settings,
    checked_settings,
    portable_settings,
    read_settings,
    resolve,
)

CONFIG = "config.toml"  # in OUT
FIXED = ("seed", "scale", "lr_patch")  # with the network and the dataset: what a run with others would not be this run


@dataclass(frozen=True)
class ResumePoint:
    """What a run goes on from; by default nothing, for a new run."""

    path: str | None = None  # of the checkpoint
    content: Mapping[str, Any] = field(default_factory=dict)
    stored: Mapping[str, Any] = field(default_factory=dict)  # the settings that the run had
    local: Mapping[str, Any] = field(default_factory=dict)  # its paths, by OUT/config.toml
    remarks: tuple[str, ...] = ()


def run_folder(chosen: Mapping[str, Any], resume: str | None) -> Path:
    """Give OUT, which is needed before all else. click.UsageError where it, or what to resume, is none."""
    out = chosen.get("out")
    if out is None:
        raise click.UsageError("Missing option '--out'.")
    for name, path in (("out", out), ("resume", resume)):
        if path is not None and (not path or "\0" in path):
            raise click.UsageError(f"--{name} must be a path, got {path!r}")
    return Path(out)


@contextmanager
def open_run(
    out: Path, chosen: Mapping[str, Any], resume: str | None, ranks: Ranks
) -> Iterator[tuple[Config, ResumePoint]]:
    """Lock a run's folder, and settle what the run goes on from and by which settings, alike in all ranks.

    `chosen` are the settings that were given. Raises CheckpointError, SettingsError, ShardsError, OSError,
    click.UsageError or RanksError where they cannot be settled.
    """
    with ExitStack() as held:
        point = ResumePoint()
        with ranks.fail_together():
            if ranks.first:
                remark = held.enter_context(locked(out))
                point = find_resume_point(out, resume)
                point = replace(point, remarks=(*point.remarks, *([remark] if remark else [])))
        point = broadcast_resume_point(point, ranks)
        with ranks.fail_together():
            config = resolve(chosen, point.stored, point.local)
            if config.batch_size % ranks.world_size:
                expected = f"a multiple of the {ranks.world_size} ranks"
                raise click.UsageError(f"--batch-size must be {expected}, got {config.batch_size}")
        ranks.require_equal(
            "settings", "\n".join(f"{flag(name)} {value}" for name, value in portable_settings(config).items())
        )
        yield config, point


def find_resume_point(out: Path, resume: str | None) -> ResumePoint:
    """Read what `--resume` names: nothing (None), OUT's newest whole checkpoint (AUTO), or that of a path.

    Raises:
        CheckpointError: there is none to go on from, there is a newer one, or there is one though none was asked for.
        SettingsError: settings that were written with it are none.
        OSError: something cannot be read.
    """
    checkpoints = out / "checkpoints"
    if resume is None:
        if saving.has_checkpoints(checkpoints):
            raise CheckpointError(f"{checkpoints}: a run is already there; add --resume auto, or take another --out")
        return ResumePoint()
    file = read_settings(out / CONFIG, read_member) if (out / CONFIG).exists() else {}
    local = {name: value for name, value in file.items() if name in LOCAL}
    found: tuple[Path, Mapping[str, Any], list[str]]
    if resume != AUTO:
        found = Path(resume), read_raw(Path(resume)), []
    elif (newest := saving.read_newest(checkpoints)) is None:
        before = {name: value for name, value in file.items() if name not in LOCAL}
        remark = f"no checkpoint in {checkpoints} yet: starting with the settings of {out / CONFIG}"
        return ResumePoint(stored=before, local=local, remarks=(one_line(remark),) if file else ())
    else:
        found = newest
    path, content, remarks = found
    shown = one_line(str(path))
    iteration, stored = content.get("iteration"), content.get("config")
    if not isinstance(stored, Mapping) or not isinstance(content.get("network"), Mapping) or type(iteration) is not int:
        raise CheckpointError(f"{shown}: expected a checkpoint of train.py, with iteration, config and network")
    newer = saving.numbered_checkpoints(checkpoints)[:1]
    if resume != AUTO and newer and saving.iteration_of(newer[0]) > iteration:
        raise CheckpointError(f"{newer[0]}: is newer than {shown}; take another --out, or --resume auto")
    try:
        # Earlier versions kept paths; where a run happens, it is asked again.
        settings = checked_settings({name: value for name, value in stored.items() if name not in LOCAL}, "config")
    except SettingsError as error:
        raise CheckpointError(f"{shown}: {error}; is it of another version of train.py?") from error
    return ResumePoint(str(path), content, settings, local, (*map(one_line, remarks), f"going on from {shown}"))


def device_name(out: Path, chosen: Mapping[str, Any], resume: str | None) -> str:
    """Say which device to use, before there is anyone to ask: the chosen one, or that of OUT/config.toml.

    That of one of several ranks is no other's: of such a run it is the kind alone.
    """
    device = chosen.get("device")
    if device is None and resume is not None:
        try:
            device = read_settings(out / CONFIG, read_member).get("device")
        except (OSError, SettingsError):  # the first rank says so
            device = None
        if device is not None and os.environ.get("WORLD_SIZE", "1") != "1":
            device = str(device).partition(":")[0]
    return str(AUTO if device is None else device)


def broadcast_resume_point(point: ResumePoint, ranks: Ranks) -> ResumePoint:
    """Give the first rank's to all, by its content: the others need not be able to read the file."""
    if ranks.world_size == 1:
        return point
    buffer = io.BytesIO()
    if ranks.first:
        torch.save({name: value if name != "remarks" else list(value) for name, value in vars(point).items()}, buffer)
    fields = torch.load(io.BytesIO(ranks.broadcast(buffer.getvalue())), map_location="cpu", weights_only=True)
    return ResumePoint(**fields | {"remarks": tuple(fields["remarks"])})


def changed_since(point: ResumePoint, config: Config) -> list[str]:
    """Say what differs from the settings that the run had.

    Raises:
        CheckpointError: it would be another network, other samples, or fewer iterations than are done.
    """
    if point.path is None:
        return [f"{text} (changed)" for text in changed_settings(point.stored, config)] if point.stored else []
    theirs, ours = point.content["network"], asdict(config.network)
    refused = [
        f"network: {name}: {_shown(theirs.get(name))} there, {value} asked for"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    for name in FIXED:
        if name in point.stored and point.stored[name] != getattr(config, name):
            refused.append(f"{flag(name)}: {point.stored[name]} there, {getattr(config, name)} asked for")
    if refused:
        raise CheckpointError(f"{point.path}: another run: {'; '.join(refused)}")
    if config.iterations < point.content["iteration"]:
        done = point.content["iteration"]
        raise CheckpointError(f"{point.path}: {done} iterations are done, --iterations {config.iterations} asked for")
    return changed_settings(point.stored, config)


def continue_stream(
    position: Mapping[str, Any], stream: Mapping[str, Any], allow_other: bool
) -> tuple[dict[str, Any], list[str]]:
    """Go on in the sample stream `stream` from a place of a run's; give the new place, and what is to be said.

    Both are mappings as PatchLoader's `state_dict` gives, with the datasets' identities; places of older versions lack
    some entries.

    Raises:
        CheckpointError: they are places of two streams; of two datasets, unless that is allowed.
    """
    sample = position.get("sample")
    if type(sample) is not int or not 0 <= sample < 1 << 62:
        raise CheckpointError(f"place: sample: expected a whole number of at least 0, got {_shown(sample)}")
    for name in ("seed", "scale", "lr_patch", "augment"):
        if name in position and position[name] != stream[name]:
            raise CheckpointError(f"another run: {name}: {_shown(position[name])} there, {stream[name]} asked for")
    there, here = (_datasets(one) for one in (position, stream))
    remarks = []
    if position.get("length") != stream["length"] or position.get("datasets", stream["datasets"]) != stream["datasets"]:
        if not allow_other:
            text = "--allow-other-dataset goes on with it all the same"
            raise CheckpointError(f"another dataset: trained on {there}, got {here}; {text}")
        remarks = [f"dataset: {there} → {here}"]
    elif "datasets" not in position:
        remarks = [f"the checkpoint does not say which dataset it was trained on; going on with {here}"]
    return {**stream, "sample": sample}, remarks


def short_id(identity: str) -> str:
    """Enough of a dataset's identity to tell it from others at a glance."""
    return identity[:12]


def _datasets(position: Mapping[str, Any]) -> str:
    names = position.get("datasets")
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    which = " + ".join(map(short_id, names)) if known and names else "one that it does not name"
    return f"{_shown(which)} ({_shown(position.get('length'))} samples per epoch)"


def _shown(value: Any) -> str:
    return one_line(f"{value!s:.120}") if isinstance(value, str | bool | int | float | None) else type(value).__name__
