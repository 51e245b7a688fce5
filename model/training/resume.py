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
from model.training.sources import SettingsError, checked, differences, portable, read_settings, resolve

CONFIG = "config.toml"  # in OUT
FIXED = ("seed", "scale", "lr_patch")  # with the network and the dataset: what a run with others would not be this run


@dataclass(frozen=True)
class Origin:
    """What a run goes on from; by default nothing, for a new run."""

    path: str | None = None  # of the checkpoint
    content: Mapping[str, Any] = field(default_factory=dict)
    stored: Mapping[str, Any] = field(default_factory=dict)  # the settings that the run had
    local: Mapping[str, Any] = field(default_factory=dict)  # its paths, by OUT/config.toml
    remarks: tuple[str, ...] = ()


def folder_of(chosen: Mapping[str, Any], resume: str | None) -> Path:
    """Give OUT, which is needed before all else. click.UsageError where it, or what to resume, is none."""
    out = chosen.get("out")
    if out is None:
        raise click.UsageError("Missing option '--out'.")
    for name, path in (("out", out), ("resume", resume)):
        if path is not None and (not path or "\0" in path):
            raise click.UsageError(f"--{name} must be a path, got {path!r}")
    return Path(out)


@contextmanager
def started(out: Path, chosen: Mapping[str, Any], resume: str | None, ranks: Ranks) -> Iterator[tuple[Config, Origin]]:
    """Lock a run's folder, and settle what the run goes on from and by which settings, alike in all ranks.

    `chosen` are the settings that were given. Raises CheckpointError, SettingsError, ShardsError, OSError,
    click.UsageError or RanksError where they cannot be settled.
    """
    with ExitStack() as held:
        origin = Origin()
        with ranks.united():
            if ranks.first:
                remark = held.enter_context(locked(out))
                origin = find_origin(out, resume)
                origin = replace(origin, remarks=(*origin.remarks, *([remark] if remark else [])))
        origin = share_origin(origin, ranks)
        with ranks.united():
            config = resolve(chosen, origin.stored, origin.local)
            if config.batch_size % ranks.world_size:
                expected = f"a multiple of the {ranks.world_size} ranks"
                raise click.UsageError(f"--batch-size must be {expected}, got {config.batch_size}")
        ranks.agree("settings", "\n".join(f"{flag(name)} {value}" for name, value in portable(config).items()))
        yield config, origin


def find_origin(out: Path, resume: str | None) -> Origin:
    """Read what `--resume` names: nothing (None), OUT's newest whole checkpoint (AUTO), or that of a path.

    Raises:
        CheckpointError: there is none to go on from, there is a newer one, or there is one though none was asked for.
        SettingsError: settings that were written with it are none.
        OSError: something cannot be read.
    """
    checkpoints = out / "checkpoints"
    if resume is None:
        if saving.any_in(checkpoints):
            raise CheckpointError(f"{checkpoints}: a run is already there; add --resume auto, or take another --out")
        return Origin()
    file = read_settings(out / CONFIG, read_member) if (out / CONFIG).exists() else {}
    local = {name: value for name, value in file.items() if name in LOCAL}
    found: tuple[Path, Mapping[str, Any], list[str]]
    if resume != AUTO:
        found = Path(resume), read_raw(Path(resume)), []
    elif (newest := saving.read_newest(checkpoints)) is None:
        before = {name: value for name, value in file.items() if name not in LOCAL}
        remark = f"no checkpoint in {checkpoints} yet: starting with the settings of {out / CONFIG}"
        return Origin(stored=before, local=local, remarks=(one_line(remark),) if file else ())
    else:
        found = newest
    path, content, remarks = found
    shown = one_line(str(path))
    iteration, stored = content.get("iteration"), content.get("config")
    if not isinstance(stored, Mapping) or not isinstance(content.get("network"), Mapping) or type(iteration) is not int:
        raise CheckpointError(f"{shown}: expected a checkpoint of train.py, with iteration, config and network")
    newer = saving.numbered(checkpoints)[:1]
    if resume != AUTO and newer and saving.number_of(newer[0]) > iteration:
        raise CheckpointError(f"{newer[0]}: is newer than {shown}; take another --out, or --resume auto")
    try:
        # Earlier versions kept paths; where a run happens, it is asked again.
        settings = checked({name: value for name, value in stored.items() if name not in LOCAL}, "config")
    except SettingsError as error:
        raise CheckpointError(f"{shown}: {error}; is it of another version of train.py?") from error
    return Origin(str(path), content, settings, local, (*map(one_line, remarks), f"going on from {shown}"))


def local_device(out: Path, chosen: Mapping[str, Any], resume: str | None) -> str:
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


def share_origin(origin: Origin, ranks: Ranks) -> Origin:
    """Give the first rank's to all, by its content: the others need not be able to read the file."""
    if ranks.world_size == 1:
        return origin
    buffer = io.BytesIO()
    if ranks.first:
        torch.save({name: value if name != "remarks" else list(value) for name, value in vars(origin).items()}, buffer)
    fields = torch.load(io.BytesIO(ranks.broadcast(buffer.getvalue())), map_location="cpu", weights_only=True)
    return Origin(**fields | {"remarks": tuple(fields["remarks"])})


def changes(origin: Origin, config: Config) -> list[str]:
    """Say what differs from the settings that the run had.

    Raises:
        CheckpointError: it would be another network, other samples, or fewer iterations than are done.
    """
    if origin.path is None:
        return [f"{text} (changed)" for text in differences(origin.stored, config)] if origin.stored else []
    theirs, ours = origin.content["network"], asdict(config.network)
    refused = [
        f"network: {name}: {_shown(theirs.get(name))} there, {value} asked for"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    for name in FIXED:
        if name in origin.stored and origin.stored[name] != getattr(config, name):
            refused.append(f"{flag(name)}: {origin.stored[name]} there, {getattr(config, name)} asked for")
    if refused:
        raise CheckpointError(f"{origin.path}: another run: {'; '.join(refused)}")
    if config.iterations < origin.content["iteration"]:
        done = origin.content["iteration"]
        raise CheckpointError(f"{origin.path}: {done} iterations are done, --iterations {config.iterations} asked for")
    return differences(origin.stored, config)


def follow(place: Mapping[str, Any], stream: Mapping[str, Any], allow_other: bool) -> tuple[dict[str, Any], list[str]]:
    """Go on in the sample stream `stream` from a place of a run's; give the new place, and what is to be said.

    Both are mappings as PatchLoader's `state_dict` gives, with the datasets' identities; places of older versions lack
    some entries.

    Raises:
        CheckpointError: they are places of two streams; of two datasets, unless that is allowed.
    """
    sample = place.get("sample")
    if type(sample) is not int or not 0 <= sample < 1 << 62:
        raise CheckpointError(f"place: sample: expected a whole number of at least 0, got {_shown(sample)}")
    for name in ("seed", "scale", "lr_patch", "augment"):
        if name in place and place[name] != stream[name]:
            raise CheckpointError(f"another run: {name}: {_shown(place[name])} there, {stream[name]} asked for")
    there, here = (_datasets(one) for one in (place, stream))
    remarks = []
    if place.get("length") != stream["length"] or place.get("datasets", stream["datasets"]) != stream["datasets"]:
        if not allow_other:
            text = "--allow-other-dataset goes on with it all the same"
            raise CheckpointError(f"another dataset: trained on {there}, got {here}; {text}")
        remarks = [f"dataset: {there} → {here}"]
    elif "datasets" not in place:
        remarks = [f"the checkpoint does not say which dataset it was trained on; going on with {here}"]
    return {**stream, "sample": sample}, remarks


def short(identity: str) -> str:
    """Enough of a dataset's identity to tell it from others at a glance."""
    return identity[:12]


def _datasets(place: Mapping[str, Any]) -> str:
    names = place.get("datasets")
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    which = " + ".join(map(short, names)) if known and names else "one that it does not name"
    return f"{_shown(which)} ({_shown(place.get('length'))} samples per epoch)"


def _shown(value: Any) -> str:
    return one_line(f"{value!s:.120}") if isinstance(value, str | bool | int | float | None) else type(value).__name__
