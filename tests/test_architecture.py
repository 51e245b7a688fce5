"""Imports point one way, and the command line does without the heavy ones."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("prep", "loader", "model", "train")
NUMPY_ONLY = {
    "fields", "files", "format", "index", "kernel", "mapped", "pipeline", "plan", "planes", "positional", "ranges",
    "readahead", "shards", "storage", "tiles",
}  # fmt: skip

# What a module may import of ours (None: nothing), by the first rule that matches it.
RULES: list[tuple[str, set[str]]] = [
    ("prep.", {"prep", *(f"loader.{name}" for name in NUMPY_ONLY)}),
    ("loader.", {"loader"}),
    ("model.evaluate", {"loader", "model", "prep.imresize", "prep.images"}),
    ("model.upscale", {"loader.format", "model", "prep.imresize", "prep.images"}),  # and model.upscalers
    ("model.pairs", {"loader", "model.metrics", "prep.imresize", "prep.images"}),
    ("model.pictures", {"loader.format", "prep.images"}),
    ("model.options", {"model.checkpoints", "model.shufflemixer", "model.tiled"}),
    ("model.export", {"model"}),
    ("model.sheet", {"model.atomic", "model.metrics"}),
    ("model.curves", {"loader.format", "model.atomic"}),
    ("model.tiled", {"model.shufflemixer"}),
    ("model.checkpoints", {"model.shufflemixer"}),
    ("model.shufflemixer", {"model.fused"}),
    ("model.fused", {"loader.kernel"}),
    ("model.training", {"loader", "model"}),
    ("model.", set()),
    ("train", {"loader", "model"}),
]
# Packages that stay out of whole parts of the house.
BANNED = {
    "loader.": {"click", "cv2", "h5py", "PIL", "tqdm"},
    "prep.": {"torch"},
    "model.shufflemixer": {"cv2", "click"},
}


def modules() -> dict[str, Path]:
    paths = [path for part in OURS for path in (ROOT / part).rglob("*.py")] + [ROOT / "train.py"]
    return {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in paths}


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


@pytest.mark.parametrize("module", modules())
def test_imports_follow_the_house(module: str) -> None:
    allowed = next(allowed for start, allowed in RULES if module.startswith(start))
    ours = {name for name in imports(modules()[module]) if name.split(".")[0] in OURS}
    strangers = {n for n in ours if not any(n == ok or n.startswith(ok + ".") for ok in allowed)}
    assert not strangers, f"{module} may import {allowed} of ours, not {strangers}"
    outside = {name.split(".")[0] for name in imports(modules()[module])}
    for start, banned in BANNED.items():
        if module.startswith(start):
            assert not outside & banned


def test_numpy_only_modules() -> None:
    """What prep takes from loader needs nothing beyond the standard library and numpy."""
    for name in NUMPY_ONLY:
        outside = {n.split(".")[0] for n in imports(ROOT / "loader" / f"{name}.py")} - set(sys.stdlib_module_names)
        assert outside <= {"numpy", "loader"}, name


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["build-shards", "--help"]])
def test_help_needs_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, prep.cli\n"
        f"try: prep.cli.main({arguments!r})\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'h5py', 'cv2', 'skimage', 'PIL', 'tqdm'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_modules_stay_small() -> None:
    for name, path in modules().items():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, name
