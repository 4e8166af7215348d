"""The tree holds only the kinds of files that belong there."""

from __future__ import annotations

from pathlib import Path

import pytest

from sm12x_build import ROOT, lint


def test_tree_is_clean() -> None:
    assert lint.tree_problems(ROOT, lint.tracked_files(ROOT)) == []


def test_no_file_is_a_failure() -> None:
    assert lint.tree_problems(ROOT, []) != []


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("runtime/kernel.cubin", b"\x7fELF\0", "no place here"),
        ("cuda/tool.so", b"x\n", "no place here"),
        ("tests/data.json", b"{}\0\n", "binary file"),
        ("cubins/helper.py", b"x = 1\n", "only cubins"),
        ("a.py", b"x = 1", "no newline"),
        ("a.py", b"x = 1\r\n", "carriage"),
        ("a.py", b"# \xff\n", "UTF-8"),
        ("a.py", b"# see /ro" + b"ot/kernels\n", "machine path"),
        ("a.md", b"from https://pyp" + b"i.org/simple\n", "registry host"),
        ("a.cu", b"// TO" + b"DO: later\n", "unfinished"),
        ("a.md", b"x" * (1 << 20) + b"x\n", "1 MiB"),
    ],
)
def test_planted_violation_is_caught(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    problems = lint.tree_problems(tmp_path, [name])
    assert any(expected in problem for problem in problems), problems


def test_tree_is_listed_without_git(tmp_path: Path) -> None:
    for name in ("kept.py", "build/output.py", ".mypy_cache/x.json", "a/b.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x\n")
    assert lint.tracked_files(tmp_path) == ["a/b.md", "kept.py"]
