"""Reading and writing settings: flags win over `--config`, then the resumed run's settings, then the defaults.

A settings file is TOML with the names of the flags. TOML is Unicode and paths are bytes, so a path that is not UTF-8
is written as `{ hex = "2f746d70" }`.
"""

import dataclasses
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from loader.errors import ShardsError, one_line
from loader.system.safefile import read_named
from model.training.settings import LOCAL, PATHS, REQUIRED, Config, MicroBatch, flag

Command = TypeVar("Command", bound=Callable[..., Any])
Settings = Mapping[str, Any]

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
LIMIT = 1 << 20  # bytes of a settings file
CHOSEN = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


class SettingsError(ShardsError):
    """Invalid settings in a file or a checkpoint."""


def setting_options(command: Command) -> Command:
    """Add a flag for every setting, `--config` and `--unset` to a command; pass its values to `given_settings`."""
    for field in reversed(FIELDS.values()):
        spelling, shown = flag(field.name), field.default not in (REQUIRED, None)
        if isinstance(field.default, bool):
            spelling += f"/{flag('no_' + field.name)}"
        command = click.option(
            spelling,
            field.name,
            type=field.metadata["type"],
            default=field.default if shown else None,
            show_default=shown,
            help=field.metadata["help"],
        )(command)
    names = [flag(name)[2:] for name, field in FIELDS.items() if field.default is not REQUIRED]
    text = "Reset a setting to its default, overriding --config and the checkpoint; repeatable."
    command = click.option("--unset", type=click.Choice(names), metavar="NAME", multiple=True, help=text)(command)
    path = click.Path(path_type=Path, dir_okay=False)
    text = "TOML file of settings, named like the flags with underscores; flags win."
    return click.option("--config", type=path, is_eager=True, expose_value=False, callback=_take_file, help=text)(
        command
    )


def given_settings(context: click.Context, values: Settings) -> dict[str, Any]:
    """Return the settings given by flags and `--config`; those named by `--unset` have their defaults.

    `values` are the arguments of a command with `setting_options`. Raises click.UsageError if a setting is both set
    and unset.
    """
    sources = {name: context.get_parameter_source(name) for name in FIELDS}
    chosen = {
        name: values[name] for name, source in sources.items() if source in (*CHOSEN, ParameterSource.DEFAULT_MAP)
    }
    for word in values["unset"]:
        name = word.replace("-", "_")
        if sources[name] in CHOSEN:
            raise click.UsageError(f"{flag(name)} and --unset {word}: expected only one of them")
        chosen[name] = FIELDS[name].default
    return chosen


def resolve(chosen: Settings, stored: Settings, local: Settings) -> Config:
    """Return a run's configuration: chosen settings win over those stored with the run and those local to its folder.

    Of `stored`, settings in LOCAL are ignored; of `local`, all others. Raises click.UsageError if a setting is missing
    or invalid.
    """
    settings = {name: value for name, value in stored.items() if name not in LOCAL}
    settings |= {name: value for name, value in local.items() if name in LOCAL}
    settings |= chosen
    for name, field in FIELDS.items():
        if field.default is REQUIRED and name not in settings:
            raise click.UsageError(f"Missing option '{flag(name)}'.")
    try:
        return Config(**settings)
    except ValueError as error:
        raise click.UsageError(one_line(str(error))) from error


def changed_settings(stored: Settings, config: Config) -> list[str]:
    """Return the settings that differ from those stored with a run, as "old → new"; missing ones had their defaults."""
    return [
        f"{flag(name)}: {_shown(stored.get(name, field.default))} → {_shown(getattr(config, name))}"
        for name, field in FIELDS.items()
        if name not in LOCAL and stored.get(name, field.default) != getattr(config, name)
    ]


def portable_settings(config: Config) -> dict[str, Any]:
    """Return the settings that checkpoints store: all but those in LOCAL."""
    return {name: value for name, value in asdict(config).items() if name not in LOCAL}


def checked_settings(values: Settings, where: str) -> dict[str, Any]:
    """Return settings read from a file, paths decoded. SettingsError for unknown names and wrong types."""
    settings = {}
    for name, value in values.items():
        if name not in FIELDS:
            raise SettingsError(f"{where}: {_shown(name)}: expected one of {', '.join(FIELDS)}")
        field = FIELDS[name]
        if name in PATHS:
            value = _path(value)
        expected, kinds = _kinds(field)
        if type(value) not in kinds or (type(value) is int and abs(value) >= 1 << 64):
            raise SettingsError(f"{where}: {name}: expected {expected}, got {_shown(value, repr)}")
        settings[name] = float(value) if field.metadata["type"] is float else value
    return settings


def read_settings(path: Path, read: Callable[[Path, int], bytes] = read_named) -> dict[str, Any]:
    """Return the settings in a TOML file; `read` is a function of `loader.system.safefile`.

    Raises SettingsError, naming the file, if it is invalid; OSError if it cannot be read.
    """
    try:
        values = tomllib.loads(read(path, LIMIT).decode())
    except (ValueError, RecursionError) as error:  # invalid TOML or UTF-8, overlong numbers
        reason = "nested too deeply" if isinstance(error, RecursionError) else one_line(str(error))
        raise SettingsError(f"{one_line(str(path))}: {reason}") from error
    return checked_settings(values, one_line(str(path)))


def to_toml(config: Config) -> str:
    """Return settings as TOML for `--config`; those that are None are left out."""
    return "".join(f"{name} = {_toml(value)}\n" for name, value in asdict(config).items() if value is not None)


def _take_file(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Make the settings in a TOML file the defaults. click.BadParameter if they are invalid."""
    if path is None:
        return
    try:
        values = read_settings(path)
    except SettingsError as error:
        raise click.BadParameter(str(error)) from error
    except OSError as error:
        raise click.BadParameter(f"{one_line(str(path))}: {error.strerror}") from error
    context.default_map = {**(context.default_map or {}), **values}


def _kinds(field: dataclasses.Field[Any]) -> tuple[str, tuple[type, ...]]:
    """Return the types a setting may have in a file: as text for messages, and as Python types."""
    if isinstance(field.default, bool):
        return "true or false", (bool,)
    empty = (type(None),) if field.default is None else ()
    if field.metadata["type"] is int:
        return "a whole number", (int, *empty)
    if field.metadata["type"] is float:
        return "a number", (int, float)
    if isinstance(field.metadata["type"], MicroBatch):
        return "a whole number or a string", (int, str)
    return "a string", (str, *empty)


def _path(value: Any) -> Any:
    """Return a path from a file in Python's form, `os.fsdecode` of its bytes; other values unchanged."""
    try:
        if isinstance(value, str):
            return os.fsdecode(value.encode("utf-8"))
        if isinstance(value, dict) and list(value) == ["hex"]:
            return os.fsdecode(bytes.fromhex(value["hex"]))
    except (ValueError, TypeError):
        pass
    return value


def _shown(value: Any, spell: Callable[[Any], str] = str) -> str:
    try:
        text = one_line(spell(value))
    except (ValueError, RecursionError):  # integers of thousands of digits, deeply nested lists
        return f"a value of type {type(value).__name__}, too long to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # TOML has the same names: inf, -inf, nan
    if not isinstance(value, str):
        return repr(value)
    name = os.fsencode(value)
    try:
        return '"' + "".join(_toml_character(c) for c in name.decode("utf-8")) + '"'
    except UnicodeDecodeError:
        return f'{{ hex = "{name.hex()}" }}'


def _toml_character(c: str) -> str:
    if c in '"\\':
        return "\\" + c
    return f"\\u{ord(c):04x}" if ord(c) < 0x20 or ord(c) == 0x7F else c
