"""Containers on this machine: which engine runs them, and what of the machine's own settings they need.

A container that installs Python packages needs what the machine itself needs for that: its certificates, its proxies
and its pip settings. They are found here by what they are, never by name of a host or an index, and nothing else of the
environment goes in.
"""

from __future__ import annotations

import configparser
import fnmatch
import itertools
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TRUST_STORE = Path("/etc/ssl/certs")
"""Where Debian keeps certificates. The images have the machine's own there, so nothing is mounted over it."""

SETTINGS = ("PIP_*", "*_PROXY")
"""Variables that go in whatever they say."""

CERTIFICATES = ("*CERT*", "*CA_BUNDLE*", "*CAINFO*", "*CAPATH*", "*SSL_ROOTS*")
"""Variables that go in when they are the path of certificates, and of no private key."""

SECRETS = ("*KEY*", "*SECRET*", "*TOKEN*", "*PASSWORD*", "*CREDENTIAL*", "AWS_*")
"""Variables that never go in, whatever else their name matches."""

BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",  # openSUSE
    "/etc/ssl/cert.pem",  # Alpine, macOS
)

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "PIP_PROXY")

HOST_NETWORK = ("--network=host",)

NPROC = 4096


class ContainerError(Exception):
    """A container cannot be had; the text says what to do about it."""


@dataclass(frozen=True)
class Engine:
    """A program that runs containers, the environment that it needs on this machine, and the containers' network."""

    program: str
    environment: Mapping[str, str] = field(default_factory=dict)
    network: tuple[str, ...] = ()

    def start(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run the program; output is kept unless `options` (of `subprocess.run`) say where it goes."""
        kept = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        environment = {**os.environ, **self.environment}
        command = [self.program, *arguments]
        return subprocess.run(command, env=environment, text=True, check=False, **{**kept, **options})

    def must(self, *arguments: str, **options: Any) -> str:
        """Run the program and return what it printed.

        Raises:
            ContainerError: it failed; the text has its last words.
        """
        done = self.start(*arguments, **options)
        if done.returncode:
            raise ContainerError(f"{self.program} {arguments[0]} failed: {last_words(done)}")
        return (done.stdout or "").strip()

    @property
    def rootless(self) -> bool:
        """Whether it is a podman of an ordinary user, whose containers see that user as another one."""
        return self.program == "podman" and os.geteuid() != 0


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The end of what a failed program said."""
    return " ".join((done.stderr or done.stdout or f"exit code {done.returncode}").split())[-400:]


def find_engine() -> Engine:
    """The first engine that answers.

    Raises:
        ContainerError: none does.
    """
    for program in ("podman", "docker"):
        if shutil.which(program) and Engine(program).start("info").returncode == 0:
            return Engine(program)
    raise ContainerError("no container engine answers: install podman (the package has that name), or start Docker")


def working(engine: Engine, image: str) -> Engine:
    """The engine with the settings under which containers of `image` run on this machine: its own where they do.

    Podman's usual runtime does not know every kind of cgroups, and podman asks for more open files and processes than
    it may have inside another container. A configuration of our own, which only our calls read, then says otherwise.

    Raises:
        ContainerError: containers do not run under any settings.
    """
    environments: list[dict[str, str]] = [{}]
    if engine.program == "podman" and shutil.which("runc"):
        environments.append({"CONTAINERS_CONF": str(_write_configuration())})
    for network, environment in itertools.product(networks(os.environ), environments):
        candidate = Engine(engine.program, environment, network)
        done = candidate.start("run", "--rm", *network, image, "true")
        if done.returncode == 0:
            return candidate
    raise ContainerError(f"{engine.program} answers but runs no container: {last_words(done)}")


def networks(environment: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The engine's options for a container's network, best first: one of its own, where nobody else's ports are.

    The machine's own network is for where a user may have no other, and for a proxy on the machine's loopback address.
    """
    proxies = " ".join(value for name, value in environment.items() if name.upper() in PROXIES)
    loopback = re.search(r"\b(localhost|127\.\d+\.\d+\.\d+)\b|\[::1\]", proxies)
    return [HOST_NETWORK] if loopback else [(), HOST_NETWORK]


def cache() -> Path:
    """The folder for what is kept from one call to the next; made when it is missing."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flip-observability"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_configuration() -> Path:
    files, processes = (resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
    processes = NPROC if processes == resource.RLIM_INFINITY else min(processes, NPROC)
    path = cache() / "containers.conf"
    path.write_text(
        f'[containers]\ndefault_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]\n\n'
        '[engine]\nruntime = "runc"\n',
        encoding="utf-8",
    )
    return path


def certificates(environment: Mapping[str, str]) -> list[str]:
    """The certificates that this machine trusts, each as PEM text; none when they are not found."""
    for place in (environment.get("SSL_CERT_FILE"), *BUNDLES):
        if place and Path(place).is_file():
            text = Path(place).read_text(encoding="utf-8", errors="replace")
            pattern = r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----"
            return [found + "\n" for found in re.findall(pattern, text, re.DOTALL)]
    return []


@dataclass(frozen=True)
class PassedOn:
    """What of this machine's settings goes into a container."""

    variables: tuple[str, ...]
    """Names only: the engine takes the values from its own environment, so that no process list shows them."""
    paths: tuple[str, ...]
    """Files and folders that the settings name, mounted read-only at the same path."""
    pip_files: tuple[tuple[Path, str], ...]
    """pip's configuration files, each with its place in the container: absolute, or below the user's home."""

    def options(self) -> list[str]:
        """The engine's options for it; `pip_files` are for the caller to put in place."""
        found = [f"--env={name}" for name in self.variables]
        return found + [mount(path, path) for path in self.paths]


def mount(source: str | Path, target: str) -> str:
    """The engine's option that shows a file or folder of this machine, read-only, to a container."""
    return f"--mount=type=bind,source={Path(source).resolve()},target={target},readonly"


def passed_on(environment: Mapping[str, str]) -> PassedOn:
    """Find what goes into a container: certificates, proxies and pip's settings, with the files that they name."""
    variables = tuple(sorted(name for name, value in environment.items() if _goes_in(name, value)))
    pip_files = tuple(_pip_files(environment))
    paths = {path for name in variables for path in _paths(environment[name])}
    for file, _ in pip_files:
        paths.update(path for value in _values(file) for path in _paths(value))
    return PassedOn(variables, tuple(sorted(paths)), pip_files)


def _goes_in(name: str, value: str) -> bool:
    def like(patterns: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatchcase(name.upper(), pattern) for pattern in patterns)

    if like(SECRETS):
        return False
    if like(SETTINGS):
        # The container has the configuration files at places of its own.
        return name != "PIP_CONFIG_FILE"
    return like(CERTIFICATES) and _is_public(Path(value))


def _is_public(path: Path) -> bool:
    """Whether it is a folder, or a file without a private key in it."""
    if not path.is_absolute():
        return False
    return path.is_dir() or (path.is_file() and b"PRIVATE KEY" not in path.read_bytes())


def _paths(value: str) -> Iterator[str]:
    """The files and folders of this machine among the words of a setting's value."""
    for word in value.split():
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.exists() and path != TRUST_STORE and TRUST_STORE not in path.parents:
            yield str(path)


def _pip_files(environment: Mapping[str, str]) -> Iterator[tuple[Path, str]]:
    home = Path(environment.get("HOME") or Path.home())
    user = Path(environment.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / "pip.conf"
    chosen = environment.get("PIP_CONFIG_FILE")
    candidates = [
        (Path("/etc/pip.conf"), "/etc/pip.conf"),
        (home / ".pip" / "pip.conf", ".pip/pip.conf"),
        # pip reads the chosen one last, so that it wins.
        (Path(chosen) if chosen and chosen != os.devnull else user, ".config/pip/pip.conf"),
    ]
    if chosen == os.devnull:  # pip's own way of saying: no configuration files
        return
    yield from ((path, place) for path, place in candidates if path.is_file())


def _values(file: Path) -> Iterator[str]:
    parser = configparser.RawConfigParser(strict=False)
    parser.read(file, encoding="utf-8")
    for section in parser.sections():
        yield from (value for _, value in parser.items(section))
