"""The kernel library stands alone: torch, triton and the standard library, relative imports, one import of triton."""

import ast
import sys
from pathlib import Path

import pytest

import lpmrf_kernels

FOLDER = Path(lpmrf_kernels.__file__).parent
SOURCES = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = {node.module.split(".")[0]}
        else:
            continue
        # What only ahead-of-time compilation needs is imported there, in a process of its own.
        triton = {"triton"} if path.name in ("_triton.py", "compile_report.py") else set()
        assert names <= {"torch", *triton, *sys.stdlib_module_names}, f"{path.name}:{node.lineno} imports {names}"


def test_public_names_exist_and_are_documented():
    for name in lpmrf_kernels.__all__:
        assert getattr(lpmrf_kernels, name).__doc__, name


def test_the_import_name_is_not_kernels():
    assert not (FOLDER.parent / "__init__.py").exists()
