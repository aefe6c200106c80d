"""Server kits as NVFLARE itself makes them, and what a folder holds down to bytes, modes and links."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import yaml

PROJECT = {
    "api_version": 3,
    "name": "net",
    "participants": [
        {"name": "server1", "type": "server", "org": "flip", "fed_learn_port": 8002, "admin_port": 8003},
        {"name": "site-1", "type": "client", "org": "flip"},
        {"name": "admin@flip.org", "type": "admin", "org": "flip", "role": "project_admin"},
    ],
    "builders": [
        {"path": "nvflare.lighter.impl.workspace.WorkspaceBuilder"},
        {"path": "nvflare.lighter.impl.static_file.StaticFileBuilder", "args": {"config_folder": "config"}},
        {"path": "nvflare.lighter.impl.cert.CertBuilder"},
        {"path": "nvflare.lighter.impl.signature.SignatureBuilder"},
    ],
}


class Entry(NamedTuple):
    mode: int
    owner: int
    group: int
    content: str


def snapshot(folder: Path) -> dict[str, Entry]:
    """Every file, folder and link below a folder."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        status = path.lstat()
        content = ""
        if path.is_symlink():
            content = f"-> {os.readlink(path)}"
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = Entry(status.st_mode, status.st_uid, status.st_gid, content)
    return found


def nvflare(home: Path, *arguments: str) -> None:
    """Run NVFLARE's own command line, whose settings are in the home folder."""
    environment = {**os.environ, "HOME": str(home), "NVFLARE_POC_WORKSPACE": str(home / "poc")}
    command = [str(Path(sys.executable).with_name("nvflare")), *arguments]
    subprocess.run(command, env=environment, cwd=home, check=True, capture_output=True, timeout=120)


def poc_kits(home: Path, clients: int = 1) -> Path:
    """The folder with the kits that ``nvflare poc prepare`` makes: ``server``, ``site-1``, …, and the admin's."""
    nvflare(home, "poc", "prepare", "-n", str(clients))
    return home / "poc" / "example_project" / "prod_00"


def provisioned_kits(home: Path) -> Path:
    """The folder with the kits that ``nvflare provision`` makes: ``server1``, ``site-1``, ``admin@flip.org``."""
    (home / "project.yml").write_text(yaml.safe_dump(PROJECT))
    nvflare(home, "provision", "-p", str(home / "project.yml"), "-w", str(home / "provisioned"))
    return home / "provisioned" / "net" / "prod_00"


def copy_of(kit: Path, target: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(kit, target, symlinks=True)
    return target
