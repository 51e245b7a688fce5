"""No module runs code that it reads: calls that could are found in the source."""

import ast
from pathlib import Path

import pytest
from helpers import ROOT
from source_tree import modules

# Calls that run code from their arguments or files, and calls that do so without (or with) a keyword argument.
RUN_CODE = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "marshal.load", "marshal.loads", "shelve.open", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "joblib.load",
    "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "subprocess.getoutput",
    "subprocess.getstatusoutput", "pandas.read_pickle", "builtins.eval", "builtins.exec",
}  # fmt: skip
REQUIRED = {"torch.load": ("weights_only", True)}
FORBIDDEN = {"numpy.load": ("allow_pickle", False), "subprocess.": ("shell", False)}


def unsafe_calls(tree: ast.AST) -> list[str]:
    """Return the calls, by full name and line, that may run code from their arguments or from a file."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found = []
    for node in ast.walk(tree):
        # A function passed as an argument counts as called; an attribute of that name does not.
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = full_name(node, known)
            found += [f"{name}, line {node.lineno}"] if name in RUN_CODE else []
        if not isinstance(node, ast.Call):
            continue
        name = full_name(node.func, known)
        given = {word.arg: getattr(word.value, "value", ...) for word in node.keywords}
        if name in REQUIRED and given.get(REQUIRED[name][0]) is not REQUIRED[name][1]:
            found.append(f"{name} without {REQUIRED[name][0]}={REQUIRED[name][1]}, line {node.lineno}")
        for start, (word, allowed) in FORBIDDEN.items():
            if name.startswith(start) and given.get(word, allowed) is not allowed:
                found.append(f"{name} with {word}, line {node.lineno}")
    return found


def full_name(node: ast.AST, known: dict[str, str]) -> str:
    """Return the dotted name of an expression with imports resolved, or "" if it has none."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (outer := full_name(node.value, known)):
        return f"{outer}.{node.attr}"
    return ""


@pytest.mark.parametrize("path", [*modules().values(), *(ROOT / "examples").glob("*.py")], ids=lambda path: path.stem)
def test_no_module_executes_its_input(path: Path) -> None:
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
def test_unsafe_calls_are_found(code: str) -> None:
    """The check above can fail."""
    assert len(unsafe_calls(ast.parse(code))) == 1
    for fine in (
        "import torch\ntorch.load('x', weights_only=True)",
        "import numpy as np\nnp.load('x')",
        "re.compile('x')",
        "class A:\n    compile: bool = False",
    ):
        assert unsafe_calls(ast.parse(fine)) == []
