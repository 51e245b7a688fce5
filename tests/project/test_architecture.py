"""The rooms of each package, the direction of imports between them, and other rules for all modules."""

import importlib
import subprocess
import sys

import pytest
from helpers import ROOT
from source_tree import imports, modules

from loader.errors import ShardsError

# The rooms of each package, lowest first. A module imports from its own room and from rooms in groups further left.
ROOMS = {
    "loader": "errors native | system arguments | format | pixels resize plan epoch | ahead | dataset | stream"
    " | batches stage",
    "prep": "console images sealed | plan | shard | workspace | build | verify bench | imresize | commands | cli",
    "model": "config losses metrics device run_log | layers | cpu | shufflemixer | torchfile | checkpoints | enlarge"
    " | evaluate upscale export | training curves",
}
# What each part may import from outside its package, besides the standard library; the longest match applies.
USES = {
    "srshards_names": "",
    "loader": "numpy",
    "loader.dataset": "numpy torch",
    "loader.stream": "numpy torch",
    "loader.batches": "numpy torch",
    "prep": "srshards_names click cv2 h5py numpy PIL tqdm loader.errors loader.native loader.system loader.format"
    " loader.pixels loader.resize loader.plan loader.ahead",
    "model": "srshards_names click cv2 matplotlib numpy onnx onnxruntime PIL torch tqdm loader prep.console"
    " prep.images",
    "model.config": "",
    "model.losses": "torch",
    "model.metrics": "cv2 numpy",
    "model.layers": "torch",
    "model.cpu": "torch loader.native",
    "model.shufflemixer": "torch",
    "train": "click torch loader prep.console model",
}
LARGEST = 300  # lines of a module,
LARGER = {"train": 400}  # except of these
LEVELS = {
    f"{package}.{name}": level
    for package, rooms in ROOMS.items()
    for level, names in enumerate(rooms.split("|"))
    for name in names.split()
}


def room(module: str) -> str:
    """Return the room of a module: `loader.format` for `loader.format.layout`, `loader.plan` for itself."""
    return ".".join(module.split(".")[:2])


def within(name: str, part: str) -> bool:
    return f"{name}.".startswith(f"{part}.")


@pytest.mark.parametrize("module", modules())
def test_imports_between_packages(module: str) -> None:
    allowed = USES[max((part for part in USES if within(module, part)), key=len)].split()
    for name in imports(modules()[module]):
        package = name.partition(".")[0]
        if package not in sys.stdlib_module_names and not within(module, package):
            assert any(within(name, part) for part in allowed), f"{module} imports {name}; allowed: {allowed}"


@pytest.mark.parametrize("module", [name for name in modules() if room(name) in LEVELS])
def test_imports_between_rooms(module: str) -> None:
    for name in imports(modules()[module]) & set(modules()):
        if within(name, module.partition(".")[0]) and room(name) != room(module) and room(name) in LEVELS:
            assert LEVELS[room(name)] < LEVELS[room(module)], f"{module} imports {name}, which is not below it"


def test_imports_have_no_circles() -> None:
    waiting = {name: imports(path) & set(modules()) - {name} for name, path in modules().items()}
    while ready := {name for name, needs in waiting.items() if not needs & set(waiting)}:
        waiting = {name: needs for name, needs in waiting.items() if name not in ready}
    assert not waiting


def test_every_room_is_listed() -> None:
    assert {room(name) for name in modules() if "." in name} == set(LEVELS)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["build-shards", "--help"], ["verify", "--help"]])
def test_help_imports_no_heavy_package(arguments: list[str]) -> None:
    code = (
        "import sys, prep.cli\n"
        f"try: prep.cli.main({arguments!r})\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'h5py', 'cv2', 'skimage', 'PIL', 'tqdm'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("module", [name for name in modules() if not name.endswith("__main__")])
def test_errors_have_one_root(module: str) -> None:
    """Every exception class derives from ShardsError, except private ones, which never reach a user."""
    found = [
        thing
        for thing in vars(importlib.import_module(module)).values()
        if isinstance(thing, type) and issubclass(thing, BaseException) and thing.__module__ == module
    ]
    for error in found:
        name = error.__name__
        assert issubclass(error, ShardsError) or name.startswith("_"), name


def test_modules_stay_small() -> None:
    for name, path in modules().items():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= LARGER.get(name, LARGEST), name
