"""README.md and docs/: every command and Python block runs, flags, paths and links exist, tables of flags are complete.

A block runs in a folder with small generated images in place of DIV2K, made smaller as `SMALLER` says. A block that
cannot run in a test stands after a comment such as `<!-- needs: cluster -->`; its syntax and flags are checked. Blocks
are marked `sh`, `python` or `text`; `text` is for what nobody types.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from helpers import ROOT, photograph, write_image

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "slurm" / "README.md"]
RUN = PAGES[:-1]
LINKED = sorted({*PAGES, *ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md"})
LANGUAGES = {"sh", "python", "text"}
WIDEST = 100
NEEDS = {"cluster", "download", "gpus", "install"}

# What pages say, and what the test runs in its place. Flags of the page come later, and so win.
SMALLER = {
    "python train.py": "python train.py --iterations 2 --batch-size 4 --lr-patch 16 --workers 1 --device cpu",
    "--warmup 1000": "--warmup 1",
    "--iterations 20000": "--iterations 2",
    "--out runs/ablation": "--out runs/ablation --variants full -- --batch-size 4 --lr-patch 16 --device cpu",
    "prep bench": "prep bench --seconds 0.2 --batch-size 4",
    "--scale 4 --scale 2": "--scale 4 --scale 2 --out shards/both",  # leaves the dataset of README.md as it was
    "batch_size=64": "batch_size=2",
    "epochs=100": "epochs=1",
    '"cuda"': '"cpu"',
}
COMMANDS = (
    *("prep build-shards", "prep info", "prep verify", "prep bench", "python train.py", "python examples/ablate.py"),
    *(f"python -m model.{name}" for name in ("evaluate", "upscale", "curves", "export")),
)
# Flags of other programs.
FOREIGN = {
    "pip install": {"--index-url", "--extra-index-url", "--dry-run"},
    "python -m venv": {"--system-site-packages"},
    "sbatch": {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--exclusive", "--requeue", "--signal"},
    "torchrun": {"--standalone", "--nproc-per-node"},
}
SCRIPTS = {"slurm/build-shards.sbatch": "prep build-shards", "slurm/train.sbatch": "python train.py"}
SCRIPTS["train.py"] = "python train.py"
PATHS = re.compile(r"(?:loader|prep|model|tests|examples|benchmarks|slurm|docs)/[\w./*-]*")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")

# Runs commands as processes forked from one that has the large imports behind it.
SERVER = """
import json, os, runpy, sys, tempfile, traceback, warnings
import click.formatting, cv2, h5py, numpy, PIL.Image, torch, torch._dynamo, torch.utils.tensorboard, tqdm
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot
click.formatting.FORCED_WIDTH = 500  # help texts unbroken

def live(words, folder, output):
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    os.chdir(folder)
    code = 0
    try:
        if words[0] == "prep":
            from prep.cli import main
            sys.argv = words
            main()
        elif words[1] == "-m":
            sys.argv = words[2:]
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        elif words[1] == "-c":
            warnings.simplefilter("error", UserWarning)
            exec(compile(words[3], words[2], "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words[1:]
            sys.path.insert(0, os.path.dirname(os.path.realpath(words[1])))
            runpy.run_path(os.path.realpath(words[1]), run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    words, folder = json.loads(line)
    output = tempfile.TemporaryFile("w+")
    child = os.fork()
    if not child:
        live(words, folder, output)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    output.seek(0)
    print(json.dumps([code, output.read()]), flush=True)
"""


class Server:
    """Runs commands one after another; close it."""

    def __init__(self) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        words = [sys.executable, "-c", SERVER]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=env, cwd=ROOT)
        self._options: dict[str, dict[str, str]] = {}

    def run(self, words: list[str], folder: Path = ROOT) -> str:
        """Run `prep ...` or `python ...`, and return what it printed; fail if it fails."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([words, str(folder)]) + "\n")
        self.process.stdin.flush()
        code, output = json.loads(self.process.stdout.readline())
        assert code == 0, f"{shlex.join(words[:3] if words[1] == '-c' else words)}\nended with {code}:\n{output}"
        return str(output)

    def options(self, command: str) -> dict[str, str]:
        """The flags of a command, and the default that --help shows for each ("" for none)."""
        if command not in self._options:
            _, _, text = self.run([*command.split(), "--help"]).partition("Options:")
            rows: list[str] = []
            for line in text.splitlines():
                if line.startswith("  -"):
                    rows.append(line)
                elif rows:  # a help text below its flags
                    rows[-1] += line
            options: dict[str, str] = {}
            for row in rows:
                default = re.search(r"\[default: ([^;\]]*)", row)
                names = re.split(r"\s{2,}", row.strip())[0]
                options |= dict.fromkeys(FLAG.findall(names), default[1] if default else "")
            options.pop("--help", None)
            self._options[command] = options
        return self._options[command]

    def close(self) -> None:
        """End the process."""
        self.process.communicate(timeout=60)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what it needs beyond this machine ("" for nothing), and its first line's number."""

    language: str
    needs: str
    line: int
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a shell block; assignments before a command are left out."""
        found = []
        for line in self.text.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if set(word) <= set("&|;"):
                    found.append(words)
                    words = []
                elif words or not re.match(r"[A-Z_]+=", word):
                    words.append(word)
        return [words for words in found if words]


@dataclass(frozen=True)
class Page:
    """A page of Markdown; `path` is None for one that only a test knows."""

    path: Path
    text: str

    @cached_property
    def blocks(self) -> list[Block]:
        """The fenced blocks."""
        fence = re.compile(r"^(?:<!-- needs: ([^\n]*) -->\n)?```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
        return [
            Block(found[2], found[1] or "", self.text.count("\n", 0, found.start(3)) + 1, found[3])
            for found in fence.finditer(self.text)
        ]

    @cached_property
    def prose(self) -> str:
        """The page without its fenced blocks."""
        return re.sub(r"^```.*?^```$", "", self.text, flags=re.DOTALL | re.MULTILINE)

    @property
    def spans(self) -> list[str]:
        """The code within lines."""
        return re.findall(r"`([^`\n]+)`", self.prose)

    @property
    def anchors(self) -> set[str]:
        """The anchors that GitHub gives to the headings."""
        headings = re.findall(r"^#+ (.*)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def read(path: Path) -> Page:
    return Page(path, path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.close()


def wrong_blocks(page: Page, server: Server) -> list[str]:
    """Blocks without a known language or mark, with wrong syntax, or with flags that do not exist."""
    wrong = []
    fences = len(re.findall(r"^```", page.text, re.MULTILINE))
    if fences != 2 * len(page.blocks) or page.text.count("<!-- needs:") != sum(bool(b.needs) for b in page.blocks):
        wrong.append("a fence or a `needs:` comment that belongs to no block")
    for block in page.blocks:
        if block.language not in LANGUAGES or not set(block.needs.split(", ")) <= {"", *NEEDS}:
            wrong.append(f"line {block.line}: expected {LANGUAGES} and {NEEDS}, got {block.language}, {block.needs}")
        wrong += [f"wider than GitHub's column: {line}" for line in block.text.splitlines() if len(line) > WIDEST]
        if block.language == "sh":
            checked = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
            wrong += [checked.stderr] if checked.returncode else []
            for words in block.commands:
                wrong += [f"line {block.line}: {problem}" for problem in wrong_flags(words, server)]
        elif block.language == "python":
            compile(block.text, str(page.path), "exec")
        elif re.search(r"^\s*(?:prep|python|pip|torchrun|sbatch|make) ", block.text, re.MULTILINE):
            wrong.append(f"line {block.line}: a command in a block of text")
    return wrong


def wrong_flags(words: list[str], server: Server) -> list[str]:
    """Flags of a command that it does not have; those after a script are the script's."""
    for number, word in enumerate(words[1:], 1):
        if word in SCRIPTS and words[0] != "python":
            return wrong_flags(words[:number], server) + wrong_flags(
                [*SCRIPTS[word].split(), *words[number + 1 :]], server
            )
    line = " ".join(words)
    known = {command: set(server.options(command)) for command in COMMANDS if f"{line} ".startswith(f"{command} ")}
    known |= {program: flags for program, flags in FOREIGN.items() if f"{line} ".startswith(f"{program} ")}
    allowed = set().union(*known.values())
    if words[0] in ("prep", "python") and not known:
        return [f"{line}: expected one of {', '.join(COMMANDS)}"]
    used = {word.split("=")[0] for word in words if word.startswith("--") and word != "--"}
    return [f"{line}: has no {flag}" for flag in sorted(used - allowed)]


def wrong_spans(page: Page, server: Server) -> list[str]:
    """Flags named within lines that do not exist."""
    everywhere = set().union(*(server.options(command) for command in COMMANDS), *FOREIGN.values())
    return [f"{flag} in `{span}`" for span in page.spans for flag in FLAG.findall(span) if flag not in everywhere]


def wrong_links(page: Page) -> list[str]:
    """Links to files or headings that do not exist, and paths in code that do not."""
    wrong = [span for span in page.spans if PATHS.fullmatch(span) and not list(ROOT.glob(span.rstrip("/")))]
    for target in re.findall(r"\]\(([^)\s]+)\)", page.prose):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.path.parent / name).resolve() if name else page.path
        if not path.exists() or ROOT not in (path, *path.parents):
            wrong.append(f"{target}: no such file")
        elif anchor and anchor not in (page if path == page.path else read(path)).anchors:
            wrong.append(f"{target}: no such heading")
    return wrong


def wrong_tables(page: Page, server: Server) -> list[str]:
    """Tables of flags, each after `<!-- flags: COMMAND -->`, that differ from --help in a flag or a default."""
    wrong = []
    for command, table in re.findall(r"<!-- flags: (.*) -->\n((?:\|.*\n)+)", page.text):
        options, named = dict(server.options(command)), set()
        for row in table.splitlines()[2:]:
            flags, default, _ = (cell.strip() for cell in row.strip("|").split("|", 2))
            for flag in FLAG.findall(flags):
                named.add(flag)
                shown = options.get(flag, "")
                # A default of several words may be said in others.
                if bool(shown) != bool(default) or (" " not in shown and shown != default):
                    wrong.append(f"{command} {flag}: expected default {shown!r}, got {default!r}")
        if named != set(options):
            wrong.append(f"{command}: expected {sorted(options)}, got {sorted(named)}")
    return wrong


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_and_flags(path: Path, server: Server) -> None:
    page = read(path)
    assert wrong_blocks(page, server) + wrong_spans(page, server) + wrong_tables(page, server) == []


@pytest.mark.parametrize("path", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths(path: Path) -> None:
    assert wrong_links(read(path)) == []


def test_every_command_has_a_table_of_its_flags() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert sorted(re.findall(r"<!-- flags: (.*) -->", text)) == sorted(COMMANDS)


def smaller(text: str) -> str:
    for said, run in SMALLER.items():
        text = text.replace(said, run)
    return text


def run_page(page: Page, folder: Path, server: Server) -> None:
    """Run the blocks that need nothing, in order; the Python blocks of a page are one program."""
    program = ""
    for block in page.blocks:
        if block.needs or block.language == "text":
            continue
        if block.language == "sh":
            for words in Block("sh", "", block.line, smaller(block.text)).commands:
                assert words[0] in ("prep", "python"), f"{page.path}, line {block.line}: mark what {words[0]} needs"
                server.run(words, folder)
        else:
            program += "\n" * (block.line - 1 - program.count("\n")) + smaller(block.text)
    if program:
        server.run(["python", "-c", str(page.path), program], folder)


@pytest.fixture(scope="module")
def after_readme(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Path:
    """A folder with images, in which all that README.md says was done."""
    folder = tmp_path_factory.mktemp("docs")
    train, valid = folder / "datasets" / "DIV2K" / "DIV2K_train_HR", folder / "DIV2K_valid_HR"
    for number, side in ((1, 530), (2, 530), (801, 140), (802, 140)):  # 8 patches of 256 pixels to train on
        path = (train if side == 530 else valid) / f"{number:04}.png"
        write_image(path, photograph(side, side + 1, seed=number))
    write_image(folder / "cat.png", photograph(30, 40))
    for name in ("train.py", "examples"):
        (folder / name).symlink_to(ROOT / name)
    run_page(read(ROOT / "README.md"), folder, server)
    return folder


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.name)
def test_commands_and_python_run(path: Path, after_readme: Path, server: Server, tmp_path: Path) -> None:
    if path.name == "README.md":
        assert {"index.json", "shard-00000.h5"} <= {
            file.name for file in (after_readme / "shards" / "DIV2K_valid_HR").iterdir()
        }
        assert (after_readme / "cat_x4.png").exists()
    else:
        folder = tmp_path / "docs"
        shutil.copytree(after_readme, folder, symlinks=True)
        (folder / "cat_x4.png").unlink()
        run_page(read(path), folder, server)


def test_the_tree_of_rooms_is_complete() -> None:
    """Every folder and module of loader/, prep/ and model/, two levels deep, and nothing else."""
    block = next(block.text for block in read(ROOT / "docs" / "architecture.md").blocks if "loader/  " in block.text)
    said, part = set(), ""
    for line in block.splitlines():
        name = line.split()[0]
        part = part if line.startswith("  ") else name
        if part in ("loader/", "prep/", "model/") and name != part:
            said.add(part + name)
    there = {path.relative_to(ROOT) for part in ("loader", "prep", "model") for path in (ROOT / part).glob("*.py")}
    there |= {path.parent.relative_to(ROOT) for path in ROOT.glob("[lpm]*/*/__init__.py")}
    assert said == {f"{path}{'' if path.suffix else '/'}" for path in there if path.name != "__init__.py"}


def test_all_that_is_made_smaller_is_said_somewhere() -> None:
    said = "".join(block.text for path in RUN for block in read(path).blocks)
    assert [words for words in SMALLER if words not in said] == []


def test_the_readme_is_short_and_its_pictures_small() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200
    assert (ROOT / "docs" / "pictures" / "comparison.png").stat().st_size < 250_000
    assert (ROOT / "docs" / "pictures" / "loading.png").stat().st_size < 60_000


@pytest.mark.parametrize(
    "text",
    [
        "```\nprep info DIR\n```\n",  # no language
        "```text\nprep info DIR\n```\n",
        "```sh\nprep build-shard DIR --scale 4\n```\n",
        "```sh\nprep build-shards DIR --scales 4\n```\n",
        "```sh\nprep info DIR && python -m model.evaluate --bicubics\n```\n",
        "<!-- needs: gpus -->\n```sh\ntorchrun --standalone train.py --iteration 3\n```\n",
        "<!-- needs: cluster -->\n```sh\nSTAGE=1 sbatch --node=2 slurm/train.sbatch --shards DIR\n```\n",
        f"```text\n{'-' * 101}\n```\n",
        "<!-- needs: patience -->\n```sh\nprep info DIR\n```\n",
        "<!-- needs: gpus -->\n\n```sh\nprep info DIR\n```\n",
        "<!-- needs: gpus -->\n```sh\nfor (\n```\n",
        "`--scales`",
        "`loader/nothing.py`",
        "[page](docs/nothing.md)",
        "[page](README.md#nothing)",
        "<!-- flags: prep info -->\n| | | |\n|---|---|---|\n| `--json` | | |\n",
        "<!-- flags: prep info -->\n| | | |\n|---|---|---|\n| `--json`, `--system` | yes | |\n",
    ],
)
def test_what_is_wrong_is_seen(text: str, server: Server) -> None:
    page = Page(ROOT / "PAGE.md", text)
    assert (
        len(wrong_blocks(page, server) + wrong_spans(page, server) + wrong_tables(page, server) + wrong_links(page)) > 0
    )


def test_a_command_that_fails_is_seen(server: Server, tmp_path: Path) -> None:
    for text in ("```sh\nprep info nothing\n```\n", "```python\nassert False\n```\n", "```sh\nls\n```\n"):
        with pytest.raises(AssertionError):
            run_page(Page(tmp_path / "page.md", text), tmp_path, server)
