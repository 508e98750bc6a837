"""Keeps the download out of runs that do not ask for it, and knows transformers' own pytest marks."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `tiny`
MARKS = ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "order", "torch_compile_test")


def pytest_configure(config: pytest.Config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: transformers' own")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if "not conformance" in config.option.markexpr else None
