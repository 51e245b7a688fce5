"""`make test-sanitized` runs instrumented C extensions, and errors in them are reported."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

EXTENSIONS = ("loader.pixels._gather", "model.cpu._mixing", "loader.resize._imresize")

pytestmark = pytest.mark.skipif(os.environ.get("SRSHARDS_SANITIZE") != "1", reason="for make test-sanitized")

# Kinds of errors that C extensions could make in memory of numpy and torch.
FAULTY = """
#include <stdint.h>
#include <string.h>
void write_at(uint8_t *bytes, int64_t at) { bytes[at] = 1; }
uint8_t read_at(const uint8_t *bytes, int64_t at) { return bytes[at]; }
int64_t times(int64_t a, int64_t b) { return a * b; }
float unaligned(const uint8_t *bytes) { return *(const float *)(bytes + 1); }
"""
CALLS = {
    "write_at(np.zeros(100, np.uint8).ctypes.data, 100)": "heap-buffer-overflow",
    "read_at(np.zeros(1 << 20, np.uint8).ctypes.data, -1)": "heap-buffer-overflow",
    "read_at(bytearray(64), 70)": "heap-buffer-overflow",
    "write_at(torch.zeros(100, dtype=torch.uint8).data_ptr(), 130)": "heap-buffer-overflow",
    "times(1 << 62, 4)": "signed integer overflow",
    "unaligned(np.zeros(64, np.uint8).ctypes.data)": "misaligned address",
}


@pytest.mark.parametrize("name", EXTENSIONS)
def test_extensions_are_instrumented(name: str) -> None:
    path = Path(str(importlib.import_module(name).__file__))
    assert path.is_relative_to(ROOT)
    assert b"libasan.so" in path.read_bytes()
    assert b"libubsan.so" in path.read_bytes()


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "faulty.c").write_text(FAULTY)
    flags = ["-shared", "-fPIC", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([os.environ["CC"], *flags, "faulty.c", "-o", "faulty.so"], cwd=folder, check=True)
    return folder / "faulty.so"


@pytest.mark.parametrize("call", CALLS)
def test_errors_are_reported(call: str, faulty: Path) -> None:
    code = (
        "import ctypes, numpy as np\n"
        f"{'import torch' if 'torch' in call else ''}\n"
        f"library = ctypes.CDLL({str(faulty)!r})\n"
        "C = ctypes\n"
        "def pointer(given):\n"
        "    if isinstance(given, bytearray): return C.addressof(C.c_char.from_buffer(given))\n"
        "    return given\n"
        "def call(function, kind, *given):\n"
        "    return getattr(library, function)(kind(pointer(given[0])), *map(C.c_int64, given[1:]))\n"
        "write_at = lambda *given: call('write_at', C.c_void_p, *given)\n"
        "read_at = lambda *given: call('read_at', C.c_void_p, *given)\n"
        "times = lambda *given: call('times', C.c_int64, *given)\n"
        "unaligned = lambda *given: call('unaligned', C.c_void_p, *given)\n"
        f"{call}\n"
        "print('unnoticed')\n"
    )
    quiet = {
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "",
    }  # these errors are intended: keep them out of the reports
    words = [sys.executable, "-c", code]
    done = subprocess.run(
        words, env=os.environ | quiet, capture_output=True, text=True, errors="replace", timeout=300, check=False
    )
    assert done.returncode != 0
    assert done.stdout == ""
    assert CALLS[call] in done.stderr
