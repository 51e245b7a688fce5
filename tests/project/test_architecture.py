"""Imports point one way, and the command line does without the heavy ones."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

OURS = ("prep", "loader", "model", "train", "srshards_names")

# The rooms, lowest first. A module imports from its own room and from rooms on lines above it.
ROOMS = """
srshards_names loader.errors loader.native
loader.system loader.arguments
loader.format
loader.pixels loader.resize loader.plan loader.epoch
loader.ahead
loader.dataset
loader.stream
loader.batches loader.stage
loader
prep
prep.console prep.images prep.sealed
prep.plan
prep.shard
prep.workspace
prep.build
prep.verify prep.bench
prep.info prep.imresize
prep.commands
prep.cli
model
model.config model.losses model.metrics model.device
model.parts
model.cpu
model.shufflemixer
model.torchfile
model.checkpoints
model.enlarge
model.evaluate model.upscale model.export
model.training model.curves
train
"""
LEVELS = {room: level for level, line in enumerate(ROOMS.strip().splitlines()) for room in line.split()}
# What parts of the house may not import, ours or not.
NETWORK = ("model.config", "model.parts", "model.losses", "model.cpu", "model.shufflemixer")
BANNED = {
    "loader.": {"click", "cv2", "h5py", "PIL", "tqdm"},
    "prep.": {"torch", "loader.dataset", "loader.stream", "loader.batches"},
    "model.metrics": {"prep", "loader"},
    **{part: {"click", "cv2", "PIL", "prep", "loader.system", "loader.format", "loader.pixels"} for part in NETWORK},
}
NUMPY_ONLY = (
    "loader.errors",
    "loader.native",
    "loader.arguments",
    "loader.plan",
    "loader.epoch",
    "loader.system",
    "loader.format",
    "loader.pixels",
    "loader.resize",
    "loader.ahead",
    "loader.stage",
)


def modules() -> dict[str, Path]:
    paths = [path for part in OURS for path in (ROOT / part).rglob("*.py")] + [
        ROOT / "train.py",
        ROOT / "srshards_names.py",
    ]
    names = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imports(path: Path) -> set[str]:
    """Absolute names imported anywhere in a file: `from a import b` counts as a.b where that is a module of ours."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules())
            names |= inner or {str(node.module)}
    return names


def room(module: str) -> str:
    """The room of a module: `loader.format.layout` is in `loader.format`, `loader.plan` is a room of its own."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module: str) -> None:
    for name in imports(modules()[module]) & set(modules()) - {module}:
        same = room(name) == room(module)
        assert same or LEVELS[room(name)] < LEVELS[room(module)], f"{module} imports {name}, which is no lower"
    for start, banned in BANNED.items():
        if module.startswith(start):
            found = {name for name in imports(modules()[module]) for ban in banned if f"{name}.".startswith(f"{ban}.")}
            assert not found, f"{module} imports {found}"


def test_no_circles() -> None:
    """Modules of one room import one another without circles, too."""
    waiting = {name: imports(path) & set(modules()) - {name} for name, path in modules().items()}
    while ready := {name for name, needs in waiting.items() if not needs & set(waiting)}:
        waiting = {name: needs for name, needs in waiting.items() if name not in ready}
    assert not waiting


def test_every_room_is_in_the_list() -> None:
    assert {room(name) for name in modules()} == set(LEVELS)


def test_numpy_only_rooms() -> None:
    """What prep takes from loader needs nothing beyond the standard library and numpy."""
    for name, path in modules().items():
        if room(name) in NUMPY_ONLY:
            outside = {n.split(".")[0] for n in imports(path)} - set(sys.stdlib_module_names)
            assert outside <= {"numpy", "loader"}, name


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["build-shards", "--help"], ["verify", "--help"]])
def test_help_needs_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, prep.cli\n"
        f"try: prep.cli.main({arguments!r})\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'h5py', 'cv2', 'skimage', 'PIL', 'tqdm'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


# Calls that run what they are given, and keyword arguments without (or with) which others do.
RUN_CODE = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "marshal.load", "marshal.loads", "shelve.open", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "joblib.load",
    "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "subprocess.getoutput",
    "subprocess.getstatusoutput", "pandas.read_pickle", "builtins.eval", "builtins.exec",
}  # fmt: skip
NEEDED = {"torch.load": ("weights_only", True)}
FORBIDDEN = {"numpy.load": ("allow_pickle", False), "subprocess.": ("shell", False)}


def unsafe_calls(tree: ast.AST) -> list[str]:
    """Calls, by full name and line, that may run code found in their arguments or in a file."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found = []
    for node in ast.walk(tree):
        # A function that is handed on counts as called; a field of its name does not.
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = full_name(node, known)
            found += [f"{name}, line {node.lineno}"] if name in RUN_CODE else []
        if not isinstance(node, ast.Call):
            continue
        name = full_name(node.func, known)
        given = {word.arg: getattr(word.value, "value", ...) for word in node.keywords}
        if name in NEEDED and given.get(NEEDED[name][0]) is not NEEDED[name][1]:
            found.append(f"{name} without {NEEDED[name][0]}={NEEDED[name][1]}, line {node.lineno}")
        for start, (word, allowed) in FORBIDDEN.items():
            if name.startswith(start) and given.get(word, allowed) is not allowed:
                found.append(f"{name} with {word}, line {node.lineno}")
    return found


def full_name(node: ast.AST, known: dict[str, str]) -> str:
    """The dotted name of an expression, imports resolved; "" for what has none."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (outer := full_name(node.value, known)):
        return f"{outer}.{node.attr}"
    return ""


@pytest.mark.parametrize("path", [*modules().values(), *(ROOT / "examples").glob("*.py")], ids=lambda path: path.stem)
def test_nothing_runs_what_it_reads(path: Path) -> None:
    """No unpickling, no evaluation, no shell; checkpoints are loaded as weights only."""
    assert unsafe_calls(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')",
        "import os\nos.system('ls')",
        "from os import system as run\nrun('ls')",
        "import pickle\npickle.loads(b'')",
        "import pickle as p\nread = p.load",
        "from pickle import Unpickler\nUnpickler(file)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "from subprocess import Popen\nPopen('ls', shell=flag)",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import torch as t\nt.load('x', weights_only=flag)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import yaml\nyaml.load(text)",
        "list(map(exec, lines))",
    ],
)
def test_what_runs_code_is_seen(code: str) -> None:
    """The check above can fail."""
    assert len(unsafe_calls(ast.parse(code))) == 1
    for fine in (
        "import torch\ntorch.load('x', weights_only=True)",
        "import numpy as np\nnp.load('x')",
        "re.compile('x')",
        "class A:\n    compile: bool = False",
    ):
        assert unsafe_calls(ast.parse(fine)) == []


def test_reliability_names_tests_that_exist() -> None:
    """Each file and each test that RELIABILITY.md names; a row without figures may be of one to come."""
    paths = list((ROOT / "tests").rglob("test_*.py"))
    files, defined = {path.name for path in paths}, "\n".join(path.read_text(encoding="utf-8") for path in paths)
    named = set()
    for line in (ROOT / "RELIABILITY.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and "see below" not in line:
            named |= set(re.findall(r"\btest_\w+(?:\.py)?", line))
    assert len(named) > 20
    for name in named:
        assert name in files if name.endswith(".py") else f"def {name}(" in defined, name


def test_modules_stay_small() -> None:
    for name, path in modules().items():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, name
