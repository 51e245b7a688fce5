"""CI runs all parts, even after one has failed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

SCRIPT = ROOT / ".ci" / "run"
PARTS = ["test-sanitized", "test-lowest", "test"]


@pytest.mark.parametrize("failing", [None, *PARTS])
def test_one_failing_part_fails_ci_and_all_parts_run(failing: str | None, tmp_path: Path) -> None:
    make = tmp_path / "make"
    make.write_text(f'#!/bin/bash\necho "1 passed in $1"\n[[ $1 != {failing} ]]\n')
    make.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (0 if failing is None else 1)
    lines = done.stdout.splitlines()
    assert [line for line in lines if " passed in " in line] == [f"1 passed in {part}" for part in PARTS]
    results = [f"make {part}: {'FAILED' if part == failing else 'passed'}" for part in PARTS]
    assert [line.partition(",")[0] for line in lines[-3:]] == results
    assert all(line.endswith(" s") for line in lines[-3:])
