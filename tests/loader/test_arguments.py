"""Checks of arguments: which values are accepted, and the messages for others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loader.arguments import flag, folder_path, whole
from loader.errors import ShardsError


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), np.array(3), torch.tensor(3), torch.tensor(3).int()])
def test_whole_numbers(value: Any) -> None:
    number = whole("n", value, 0, 3)
    assert type(number) is int
    assert number == 3


@pytest.mark.parametrize(
    "value",
    [3.0, "3", True, None, [3], (3,), np.float32(3), np.bool_(True), np.array([3]), np.array(3.0), torch.tensor(3.0),
     torch.tensor(True), torch.tensor([3]), b"3", slice(3), 1j, type],
    ids=repr,
)  # fmt: skip
def test_other_types_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^n: expected a whole number, 0 or more, got .") as caught:
        whole("n", value, 0)
    assert str(caught.value).isprintable()


def test_bounds() -> None:
    assert whole("n", 1 << 70, 1) == 1 << 70
    assert whole("n", -5, None) == -5
    with pytest.raises(TypeError, match="^n: expected a whole number, any, got '5'$"):
        whole("n", "5", None)
    with pytest.raises(ValueError, match="^n: expected 1 or more, got 0$"):
        whole("n", 0, 1)
    with pytest.raises(ValueError, match="^n: expected 1 to 5, got 6$"):
        whole("n", np.int64(6), 1, 5)
    with pytest.raises(ValueError, match="^n: expected 1 to 5, got "):  # more digits than Python converts to text
        whole("n", 10**5000, 1, 5)


def test_messages_are_one_short_line() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError("no repr")

    for value in ("a\nb\x1b[31m" * 100, Odd(), ["x" * 10**6]):
        with pytest.raises(TypeError) as caught:
            whole("n", value, 0)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


def test_flags() -> None:
    assert flag("f", True) is True
    assert flag("f", np.bool_(False)) is False
    for value in (1, 0, None, "yes", torch.tensor(True)):
        with pytest.raises(TypeError, match="^f: expected True or False, got "):
            flag("f", value)


def test_folders() -> None:
    assert folder_path("folder", "a") == folder_path("folder", Path("a")) == folder_path("folder", b"a") == Path("a")
    for empty in ("", b"", "a\0b"):
        with pytest.raises(ShardsError, match="^folder: expected the path of a folder, got "):
            folder_path("folder", empty)
    for wrong in (None, 3, ["a"]):
        with pytest.raises(TypeError, match="^folder: expected the path of a folder, got "):
            folder_path("folder", wrong)
