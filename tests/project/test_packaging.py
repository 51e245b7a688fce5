"""Contents of sdist and wheel; programs that use the installed wheel run, and pass type checks."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
from helpers import ROOT
from lowest import declared, pins

GENERATED = {"PKG-INFO"}  # by setuptools, in addition to its egg-info

USER = """
import numpy as np
from loader import PatchDataset, PatchLoader
from loader.format.index import read_index
from model.losses import combined
from pathlib import Path
from prep.imresize import imresize

small = imresize(np.zeros((8, 8, 3), np.uint8), 2)
names: list[str] = list(read_index(Path("shards")).name)
"""
WRONG = """
from loader import FormatError
from prep.imresize import imresize
text: int = FormatError("x")
imresize("x", 2)
"""


def run(words: list[str], cwd: Path, **environment: str) -> str:
    """Run a command that must succeed; return its output."""
    done = subprocess.run(
        words, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """Build the sdist or the wheel as pip does; return its path."""
    code = f"import sys, setuptools.build_meta as backend; backend.build_{kind}(sys.argv[1])"
    run([sys.executable, "-c", code, str(out)], source)
    (built,) = out.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return built


@pytest.fixture(scope="module")
def sources() -> list[str]:
    """The files of the checkout that are tracked, or untracked but not ignored."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a checkout")
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT)
    return sorted(name for name in set(listed.split("\0")) if name and (ROOT / name).exists())


@pytest.fixture(scope="module")
def unpacked(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist, built from the files of the checkout only."""
    place = tmp_path_factory.mktemp("sdist")
    for name in sources:
        (place / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place / "checkout" / name)
    with tarfile.open(build("sdist", place / "checkout", place)) as archive:
        archive.extractall(place, filter="data")
    (folder,) = place.glob("srshards-*/")
    return folder


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist."""
    copy = tmp_path_factory.mktemp("wheel") / "source"
    shutil.copytree(unpacked, copy)
    return build("wheel", copy, copy.parent)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a virtual environment with the wheel and the packages of this environment."""
    place = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", str(place)], place)
    (packages,) = place.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "others.pth").write_text("\n".join([sysconfig.get_path("platlib"), *others]) + "\n")
    return place / "bin" / "python"


def test_sdist_is_the_whole_checkout(unpacked: Path, sources: list[str]) -> None:
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert {name for name in files if ".egg-info/" not in name} == {*sources, *GENERATED}
    assert os.access(unpacked / ".ci" / "run", os.X_OK) == os.access(ROOT / ".ci" / "run", os.X_OK)


def test_wheel_contains_only_what_runs(wheel: Path, sources: list[str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        records = {name.partition("/")[2]: archive.read(name).decode() for name in names if ".dist-info/" in name}
    inside = {name for name in names if ".dist-info/" not in name}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    kernels = {f"{name}{suffix}" for name in ("loader/pixels/_gather", "loader/resize/_imresize", "model/cpu/_mixing")}
    modules = {name for name in sources if name.startswith(("loader/", "model/", "prep/")) and name.endswith(".py")}
    marks = {f"{package}/py.typed" for package in ("loader", "model", "prep")}
    assert inside - kernels == modules | marks | {"train.py", "srshards_names.py"}
    assert inside & kernels in (kernels, set())  # none without a C compiler
    assert "prep = prep.cli:main" in records["entry_points.txt"]
    assert records["licenses/LICENSE"] == (ROOT / "LICENSE").read_text(encoding="utf-8")
    check_metadata(message_from_string(records["METADATA"]))


def check_metadata(metadata: Message) -> None:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert metadata["Name"] == "srshards"
    assert metadata["License"] == "MIT"
    assert metadata["Requires-Python"] == setup["options"]["python_requires"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).startswith("# srshards\n")
    needs = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert sorted(needs) == sorted(setup["options"]["install_requires"].split())
    assert all("==" not in need for need in needs)  # so that an installed torch build is kept


def test_programs_using_the_wheel_are_type_checked(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "wrong.py").write_text(WRONG)
    (tmp_path / "mypy.ini").write_text(  # checking torch and others would take half a minute
        "[mypy]\nstrict = True\n[mypy-torch.*,cv2.*,h5py.*,PIL.*]\nfollow_imports = skip\n"
    )
    words = [sys.executable, "-m", "mypy", "--python-executable", str(installed), "--no-incremental"]
    done = subprocess.run(
        [*words, "user.py", "wrong.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert [error.partition(": error: ")[0] for error in errors] == ["wrong.py:4", "wrong.py:5"], done.stdout


def test_installed_wheel_runs(installed: Path, tmp_path: Path) -> None:
    """Without the working directory on the path, and with warnings as errors."""
    strict = [str(installed), "-P", "-W", "error"]
    run([*strict, "-c", "import loader, model, prep, loader.format.layout, prep.cli, loader.resize.imresize"], tmp_path)
    assert run([*strict, "-m", "prep.cli", "--version"], tmp_path).startswith("srshards, version ")
    place = run([*strict, "-c", "import loader; print(loader.__file__)"], tmp_path)
    assert Path(place).is_relative_to(installed.parent.parent)


def test_lowest_versions_are_those_declared(tmp_path: Path) -> None:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    found = declared()
    for need in setup["options"]["install_requires"].split():
        assert need == f"{need.partition('>=')[0]}>={found[need.partition('>=')[0]]}"
    lines = pins()
    assert f"numpy=={found['numpy']}" in lines
    (torch,) = [line for line in lines if line.startswith("torch==")]
    assert torch in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    text = "[options]\ninstall_requires = numpy{}\n[options.extras_require]\ntest = numpy>=2\n"
    for wrong in ("", "==2", ">=2,<3", ">=1"):  # no lower bound, more than one, a different one
        (tmp_path / "setup.cfg").write_text(text.format(wrong))
        with pytest.raises(ValueError, match="expected name>=version, the same in all places, got numpy"):
            declared(tmp_path / "setup.cfg")


def test_files_named_in_makefile_and_scripts_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (quick,) = re.findall(r"^QUICK := (.*)$", makefile, re.MULTILINE)
    named = quick.split()
    for script in ("run_floor.sh", "run_sanitized.sh"):
        for group in re.findall(
            r"tests/\*/test_\{([\w,]+)\}\.py", (ROOT / "tests" / script).read_text(encoding="utf-8")
        ):
            named += group.split(",")
    assert len(named) > 30
    assert [name for name in named if not list((ROOT / "tests").glob(f"*/test_{name}.py"))] == []
    (parts,) = re.findall(r"^for part in (.*); do$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    for part in parts.split():
        assert re.search(rf"^{part}:", makefile, re.MULTILINE), part
