"""RELIABILITY.md names tests that exist."""

import re

from helpers import ROOT


def test_named_tests_exist() -> None:
    """Tests and test files named in RELIABILITY.md exist, except in rows that say "see below"."""
    paths = list((ROOT / "tests").rglob("test_*.py"))
    files, defined = {path.name for path in paths}, "\n".join(path.read_text(encoding="utf-8") for path in paths)
    named = set()
    for line in (ROOT / "RELIABILITY.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and "see below" not in line:
            named |= set(re.findall(r"\btest_\w+(?:\.py)?", line))
    assert len(named) > 20
    for name in named:
        assert name in files if name.endswith(".py") else f"def {name}(" in defined, name
