"""Packages of any Debian release in a folder, where their programs run with their own loader and libraries."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
LIBRARIES: Final = "usr/lib/x86_64-linux-gnu"
LOADER: Final = "ld-linux-x86-64.so.2"
# What a package's maintainer scripts may ask for; without them apt would take the machine's own for granted.
ALWAYS: Final = ("dash", "coreutils")
UNWANTED: Final = ("./usr/share/doc", "./usr/share/man", "./usr/share/locale")
TIMEOUT_S: Final = 600
DONE: Final = "unpacked"


class NotToBeHad(Exception):
    """The packages cannot be fetched on this machine; the message says why."""


def fetch(suite: str, packages: Sequence[str], folder: Path) -> Path:
    """The root folder with `packages` of `suite` and all that they need, below `folder`; fetched once.

    Raises NotToBeHad.
    """
    if shutil.which("apt-get") is None or not Path(KEYRING).exists():
        raise NotToBeHad("only Debian has apt-get and Debian's keys")
    folder.mkdir(parents=True, exist_ok=True)
    root = folder.resolve() / "root"
    with _alone(folder):
        if not (folder / DONE).exists():
            shutil.rmtree(root, ignore_errors=True)
            debs = _download(suite, packages, folder.resolve() / "apt")
            _unpack(debs, root)
            _let_programs_run_in_place(root, _patchelf(folder.resolve() / "apt"))
            (folder / DONE).touch()
    return root


def version_of(folder: Path, package: str) -> str:
    """The release of a fetched package; empty if it is not there."""
    for deb in (folder / "apt/cache/archives").glob(f"{package}_*.deb"):
        return _run(["dpkg-deb", "--field", str(deb), "Version"]).strip()
    return ""


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(suite: str, packages: Sequence[str], apt: Path) -> list[Path]:
    for needed in ("state/lists/partial", "cache/archives/partial"):
        (apt / needed).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()  # nothing counts as installed: all that is needed is downloaded, libc too
    (apt / "other.sources").write_text(
        f"Types: deb\nURIs: {_mirror()}\nSuites: {suite}\nComponents: main\nSigned-By: {KEYRING}\n"
    )
    settings = {
        "Dir::Etc::sourcelist": apt / "other.sources",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::State": apt / "state",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "APT::Sandbox::User": "root",
        "APT::Install-Recommends": "false",
        "Debug::NoLocking": "true",
        "Acquire::Languages": "none",
    }
    options = [it for name, value in settings.items() for it in ("-o", f"{name}={value}")]
    _run(["apt-get", *options, "-qq", "update"])
    _run(["apt-get", *options, "-y", "-qq", "--download-only", "install", *packages, *ALWAYS])
    return sorted((apt / "cache/archives").glob("*.deb"))


def _mirror() -> str:
    """The mirror of Debian that this machine uses."""
    found = _run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]).split()
    mirrors = [it for it in found if it.rstrip("/").endswith("/debian")]
    if not mirrors:
        raise NotToBeHad("this machine's apt knows no mirror of Debian")
    return mirrors[0]


def _unpack(debs: Sequence[Path], root: Path) -> None:
    for name in ("bin", "sbin", "lib", "lib64"):  # as every release has them by now
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(f"usr/{name}")
    excluded = [f"--exclude={it}" for it in UNWANTED]
    for deb in debs:
        archive = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE)
        tar = ["tar", "-x", "-C", str(root), "--keep-directory-symlink", "--no-same-owner", *excluded]
        subprocess.run(tar, stdin=archive.stdout, check=True, timeout=TIMEOUT_S)
        if archive.wait() != 0:
            raise NotToBeHad(f"{deb.name} cannot be unpacked")


def _patchelf(apt: Path) -> str:
    """The program that changes where a program looks for its loader and libraries."""
    found = shutil.which("patchelf")
    if found is not None:
        return found
    tools = apt / "tools"
    tools.mkdir(exist_ok=True)
    _run(["apt-get", "download", "-qq", "patchelf"], folder=tools)
    for deb in tools.glob("patchelf_*.deb"):
        _run(["dpkg-deb", "-x", str(deb), str(tools)])
    return str(tools / "usr/bin/patchelf")


def _let_programs_run_in_place(root: Path, patchelf: str) -> None:
    loader = next(iter([*root.glob(f"usr/lib/**/{LOADER}"), *root.glob(f"usr/lib64/{LOADER}")]), None)
    if loader is None:
        raise NotToBeHad("these packages have no loader for this machine's kind of processor")
    libraries = f"{root}/{LIBRARIES}:{root}/{LIBRARIES}/systemd"
    erlang = root / "usr/lib/erlang"
    places = [root / "usr/bin", root / "usr/sbin", erlang / "bin"]
    places += [*erlang.glob("erts-*/bin"), *erlang.glob("lib/*/priv/bin")]
    for place in places:
        for program in place.glob("*") if place.exists() else ():
            if program.is_symlink() or not program.is_file() or program.open("rb").read(4) != b"\x7fELF":
                continue
            if subprocess.run([patchelf, "--print-interpreter", program], capture_output=True).returncode == 0:
                change = ["--set-interpreter", str(loader), "--force-rpath", "--set-rpath", libraries]
                _run([patchelf, *change, str(program)])
    for script in [erlang / "bin/erl", *erlang.glob("erts-*/bin/erl")]:
        if script.exists():
            text = script.read_text()
            script.write_text(
                text.replace('"/usr/lib/erlang"', f'"{erlang}"').replace("=/usr/lib/erlang\n", f"={erlang}\n")
            )


def _run(command: Sequence[str], *, folder: Path | None = None) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise NotToBeHad(f"{command[0]} failed: {' '.join(done.stderr.split())[-300:]}")
    return done.stdout
