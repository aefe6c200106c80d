"""What an import brings along: the package stays light, and NVFLARE stays where it belongs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import flip_observability

SOURCE = Path(flip_observability.__file__).parent
MAY_IMPORT_NVFLARE = ("nvflare", "demo")


def _imported(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return {name.partition(".")[0] for name in out.split()}


def test_the_package_imports_neither_nvflare_nor_a_framework() -> None:
    heavy = {"nvflare", "torch", "tensorflow", "numpy", "boto3", "requests", "pydantic"}
    assert not _imported("import flip_observability") & heavy


def test_the_client_and_the_command_line_do_without_nvflare() -> None:
    assert not _imported("from flip_observability import FLIP") & {"nvflare", "torch"}
    assert not _imported("import flip_observability.cli") & {"nvflare", "torch", "moto", "sklearn", "boto3"}


def test_the_components_do_without_a_framework() -> None:
    assert not _imported("import flip_observability.nvflare.components") & {"torch", "tensorflow", "sklearn", "moto"}


def test_only_nvflare_and_demo_import_nvflare() -> None:
    wrong = []
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).parts[0] in MAY_IMPORT_NVFLARE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            wrong += [path.name for name in names if name.partition(".")[0] == "nvflare"]
    assert wrong == []
