"""Resuming a run: finding its checkpoint, and checking which settings and data may differ from it.

Rank 0 reads and broadcasts: on a cluster, other nodes may see another folder at the same path, or an outdated one.
"""

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
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
FIXED = ("seed", "scale", "lr_patch")  # besides the network and the dataset: a resumed run must not change these


@dataclass(frozen=True)
class ResumePoint:
    """The state a run resumes from; by default none, for a new run."""

    path: str | None = None  # of the checkpoint
    content: Mapping[str, Any] = field(default_factory=dict)
    stored: Mapping[str, Any] = field(default_factory=dict)  # its settings
    local: Mapping[str, Any] = field(default_factory=dict)  # paths and device from OUT/config.toml
    notes: tuple[str, ...] = ()  # messages for the user


def run_folder(chosen: Mapping[str, Any], resume: str | None) -> Path:
    """Return OUT. click.UsageError if it is missing, or if it or `resume` is not a path."""
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
    """Lock a run's folder; yield its settings and the point to resume from, the same on all ranks.

    `chosen` holds the settings given by the user. Raises CheckpointError, SettingsError, ShardsError, OSError,
    click.UsageError or RanksError.
    """
    with ExitStack() as held:
        point = ResumePoint()
        with ranks.fail_together():
            if ranks.first:
                message = held.enter_context(locked(out))
                point = find_resume_point(out, resume)
                point = replace(point, notes=(*point.notes, *([message] if message else [])))
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
    """Read the checkpoint named by `--resume`: none (None), the newest undamaged one in OUT (AUTO), or that at a path.

    Raises:
        CheckpointError: there is none, OUT holds a newer one, or OUT holds one although `resume` is None.
        SettingsError: OUT/config.toml is invalid.
        OSError: a file cannot be read.
    """
    checkpoints = out / "checkpoints"
    if resume is None:
        if saving.has_checkpoints(checkpoints):
            raise CheckpointError(f"{checkpoints}: already holds a run; use --resume auto or another --out")
        return ResumePoint()
    file = read_settings(out / CONFIG, read_member) if (out / CONFIG).exists() else {}
    local = {name: value for name, value in file.items() if name in LOCAL}
    found: tuple[Path, Mapping[str, Any], list[str]]
    if resume != AUTO:
        found = Path(resume), read_raw(Path(resume)), []
    elif (newest := saving.read_newest(checkpoints)) is None:
        before = {name: value for name, value in file.items() if name not in LOCAL}
        note = f"no checkpoint in {checkpoints} yet; starting with the settings in {out / CONFIG}"
        return ResumePoint(stored=before, local=local, notes=(one_line(note),) if file else ())
    else:
        found = newest
    path, content, notes = found
    shown = one_line(str(path))
    iteration, stored = content.get("iteration"), content.get("config")
    if not isinstance(stored, Mapping) or not isinstance(content.get("network"), Mapping) or type(iteration) is not int:
        raise CheckpointError(f"{shown}: expected a train.py checkpoint with iteration, config and network")
    newer = saving.numbered_checkpoints(checkpoints)[:1]
    if resume != AUTO and newer and saving.iteration_of(newer[0]) > iteration:
        raise CheckpointError(f"{newer[0]}: is newer than {shown}; use another --out or --resume auto")
    try:
        # Checkpoints of earlier versions hold paths and the device, too.
        settings = checked_settings({name: value for name, value in stored.items() if name not in LOCAL}, "config")
    except SettingsError as error:
        raise CheckpointError(f"{shown}: {error}; was it written by another version of train.py?") from error
    return ResumePoint(str(path), content, settings, local, (*map(one_line, notes), f"resuming from {shown}"))


def device_name(out: Path, chosen: Mapping[str, Any], resume: str | None) -> str:
    """Return the name of the device to use: the chosen one, or that in OUT/config.toml.

    Ranks need this before they can connect. With several ranks the stored device may be another rank's: only its type
    counts.
    """
    device = chosen.get("device")
    if device is None and resume is not None:
        try:
            device = read_settings(out / CONFIG, read_member).get("device")
        except (OSError, SettingsError):  # rank 0 reports this
            device = None
        if device is not None and os.environ.get("WORLD_SIZE", "1") != "1":
            device = str(device).partition(":")[0]
    return str(AUTO if device is None else device)


def broadcast_resume_point(point: ResumePoint, ranks: Ranks) -> ResumePoint:
    """Return rank 0's point on all ranks, content included: the others need not be able to read the file."""
    if ranks.world_size == 1:
        return point
    buffer = io.BytesIO()
    if ranks.first:
        torch.save({field.name: getattr(point, field.name) for field in fields(point)}, buffer)
    received = torch.load(io.BytesIO(ranks.broadcast(buffer.getvalue())), map_location="cpu", weights_only=True)
    return ResumePoint(**received)


def changed_since(point: ResumePoint, config: Config) -> list[str]:
    """Return the settings that differ from those stored with the run, as messages.

    Raises:
        CheckpointError: the network or the samples would differ, or more iterations are done than requested.
    """
    if point.path is None:
        return [f"{text} (changed)" for text in changed_settings(point.stored, config)] if point.stored else []
    theirs, ours = point.content["network"], asdict(config.network)
    refused = [
        f"network: {name}: {_shown(theirs.get(name))} in the checkpoint, {value} requested"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    for name in FIXED:
        if name in point.stored and point.stored[name] != getattr(config, name):
            refused.append(f"{flag(name)}: {point.stored[name]} in the checkpoint, {getattr(config, name)} requested")
    if refused:
        raise CheckpointError(f"{point.path}: cannot resume: {'; '.join(refused)}")
    if config.iterations < point.content["iteration"]:
        done = point.content["iteration"]
        raise CheckpointError(f"{point.path}: {done} iterations are done, --iterations {config.iterations} requested")
    return changed_settings(point.stored, config)


def continue_stream(
    position: Mapping[str, Any], stream: Mapping[str, Any], allow_other: bool
) -> tuple[dict[str, Any], list[str]]:
    """Return the position at which to resume in the sample stream `stream`, and messages for the user.

    Both are mappings as returned by PatchLoader's `state_dict`, with the datasets' identities added; positions of
    earlier versions lack some entries.

    Raises:
        CheckpointError: the streams differ, or the datasets do and `allow_other` is False.
    """
    sample = position.get("sample")
    if type(sample) is not int or not 0 <= sample < 1 << 62:
        raise CheckpointError(f"place: sample: expected a whole number of at least 0, got {_shown(sample)}")
    for name in ("seed", "scale", "lr_patch", "augment"):
        if name in position and position[name] != stream[name]:
            raise CheckpointError(
                f"cannot resume: {name}: {_shown(position[name])} in the checkpoint, {stream[name]} requested"
            )
    there, here = (_datasets(one) for one in (position, stream))
    notes = []
    if position.get("length") != stream["length"] or position.get("datasets", stream["datasets"]) != stream["datasets"]:
        if not allow_other:
            text = "use --allow-other-dataset to resume anyway"
            raise CheckpointError(f"different dataset: trained on {there}, got {here}; {text}")
        notes = [f"dataset: {there} → {here}"]
    elif "datasets" not in position:
        notes = [f"the checkpoint does not record its dataset; resuming with {here}"]
    return {**stream, "sample": sample}, notes


def short_id(identity: str) -> str:
    """Return a dataset's identity, abbreviated."""
    return identity[:12]


def _datasets(position: Mapping[str, Any]) -> str:
    names = position.get("datasets")
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    which = " + ".join(map(short_id, names)) if known and names else "an unnamed one"
    return f"{_shown(which)} ({_shown(position.get('length'))} samples per epoch)"


def _shown(value: Any) -> str:
    return one_line(f"{value!s:.120}") if isinstance(value, str | bool | int | float | None) else type(value).__name__
