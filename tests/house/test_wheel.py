"""The wheel, as a stranger installs it: beside other people's packages with our folders' names, run from elsewhere."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests import processes, servers
from tests.processes import House, wait_for

pytestmark = pytest.mark.process

PROJECT = Path(__file__).parents[2]
FOLDERS = ("producers", "worker", "migrations")
BUILD_TIMEOUT_S = 120
RUN_TIMEOUT_S = 60
STRANGER = 'raise ImportError("this {} is another distribution\'s")\n'


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel in it, and an empty folder to run its commands in."""

    python: Path
    packages: Path
    elsewhere: Path

    def command(self, name: str, *arguments: str) -> list[str]:
        return [str(self.python.parent / name), *arguments]

    def run(self, *command: str, env: Mapping[str, str] = {}) -> str:
        """Standard output of a command that ends well."""
        done = subprocess.run(
            command, cwd=self.elsewhere, env=bare(env), capture_output=True, text=True, timeout=RUN_TIMEOUT_S
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def bare(env: Mapping[str, str]) -> dict[str, str]:
    """An environment that does not lead back to this checkout."""
    return {**processes.environment(env), "PYTHONPATH": ""}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built once from what the Dockerfile copies."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "node_modules", "vendor")
        shutil.copytree(PROJECT / name, source / name, ignore=ignored)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(built), str(source)],
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
    )
    if "No matching distribution found for setuptools" in done.stderr:
        raise servers.Unavailable("building a wheel takes setuptools from the package index, which does not answer")
    assert done.returncode == 0, done.stderr
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Dependencies are those of the tests' own environment; of its .pth files, the editable install's, none is read."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(home)}))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for name in FOLDERS:
        (packages / name).mkdir()
        (packages / name / "__init__.py").write_text(STRANGER.format(name))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=BUILD_TIMEOUT_S)
    return Installed(python, packages, tmp_path_factory.mktemp("elsewhere"))


def test_the_wheel_holds_tombola_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"tombola"}
    files = {
        path.relative_to(PROJECT)
        for folder in FOLDERS
        for path in (PROJECT / folder).rglob("*")
        if path.is_file() and not {"__pycache__", "examples"} & set(path.parts) and path.suffix not in (".md", ".png")
    }
    assert {path.suffix for path in files} >= {".py", ".html", ".js", ".css", ".json", ".yml", ".typed"}
    assert sorted({f"tombola/{path.as_posix()}" for path in files} - names) == []


def test_other_peoples_packages_of_our_names_are_left_alone(installed: Installed) -> None:
    for name in FOLDERS:
        assert (installed.packages / name / "__init__.py").read_text() == STRANGER.format(name)
    script = "import tombola.migrations.history as a, tombola.producers as b, tombola.worker.cli as c\n"
    found = installed.run(str(installed.python), "-c", script + "print(a.__file__, b.__file__, c.__file__)").split()
    assert all(path.startswith(str(installed.packages)) for path in found), found
    assert installed.run(*installed.command("tombola", "--version")) == "tombola 0.1.0\n"


def test_it_migrates_and_settles_a_draw_from_an_empty_folder(
    installed: Installed, mariadb_url: str, redis_url: str
) -> None:
    port = servers._free_port()
    house = House(mariadb_url, redis_url, redis_url, TOMBOLA_GATEWAY_AUTH="none")
    assert "upgraded to" in installed.run(*installed.command("tombola", "migrate"), env=house.env)
    assert "pending" not in installed.run(*installed.command("tombola", "migrate", "status"), env=house.env)
    (account_id,) = house.accounts(1)
    celery = [str(installed.python), "-m", "celery", "-A", "tombola.worker", "worker", "--loglevel=INFO"]
    gateway = installed.command("tombola", "gateway", "--port", str(port))
    env = house.env | {"PYTHONPATH": ""}
    with (
        processes.worker(env, command=gateway, until="startup complete") as serving,
        httpx.Client(base_url=f"http://{servers.HOST}:{port}", timeout=RUN_TIMEOUT_S) as client,
    ):
        wait_for(lambda: answers(client), within_s=RUN_TIMEOUT_S, what=serving.log)
        asked = client.post("/v1/draws", json={"account_id": account_id}, headers={"Idempotency-Key": "first"})
        assert asked.status_code == 202, asked.text
        with processes.worker(env, command=celery) as settling:
            house.wait_settled(1, within_s=RUN_TIMEOUT_S, log=settling.log)
            assert settling.stop() == 0
        # The page that draws, and the description of the API, are files of the wheel.
        assert client.get("/openapi.json").status_code == 200
    assert house.violations() == []
    house.engine.dispose()


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/healthz").text == "ok"
    except httpx.TransportError:
        return False


def test_all_of_it_comes_up_from_an_empty_folder(installed: Installed, tmp_path: Path) -> None:
    env = {"TOMBOLA_HOME": str(tmp_path / "home")}
    said = installed.run(*installed.command("tombola", "up", "--draws", "20", "--exit"), env=env)
    assert "20 draws settled" in " ".join(said.split())
    assert "The books balance." in said
    assert os.listdir(installed.elsewhere) == []
