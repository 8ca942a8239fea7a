"""The boundary is the broker: what stands before it never needs what stands behind it, and the pure stays pure."""

import ast
import functools
import graphlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = Path(__file__).parents[2]
PRODUCERS = sorted((PROJECT / "producers").rglob("*.py"))
WORKER = sorted((PROJECT / "worker").rglob("*.py"))
MIGRATIONS = sorted((PROJECT / "migrations").rglob("*.py"))

# A web process that only asks for draws must not carry a task queue, nor a way to settle.
BEHIND_THE_BROKER = {"worker", "celery", "billiard", "migrations", "alembic", "tests"}
# Whoever opens a socket, a file or a database: neither a key nor a draw may hang on one.
OUTWARD = {
    *("sqlalchemy", "redis", "pymysql", "kombu", "amqp", "celery", "pydantic", "alembic", "tombola.worker.ledger.post"),
    *("socket", "ssl", "asyncio", "http", "urllib.request", "subprocess", "sqlite3", "multiprocessing"),
}


@functools.cache
def imported(path: Path) -> list[tuple[int, str]]:
    """Line and full name of every module that a file imports, anywhere in it."""
    return list(_imported(path))


def _imported(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports are not followed here"
            assert node.module is not None
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("__import__", "importlib.import_module", "import_module"):
                yield node.lineno, ast.literal_eval(node.args[0])


def top(name: str) -> str:
    """`worker` of tombola.worker.settle, `celery` of celery.app."""
    return name.removeprefix("tombola.").partition(".")[0]


def python(script: str) -> list[str]:
    """The words that `script` prints in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, env={**os.environ}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def file_name(path: Path) -> str:
    """The name that a file is imported by."""
    return ".".join(("tombola", *path.relative_to(PROJECT).with_suffix("").parts)).removesuffix(".__init__")


def test_there_is_something_to_look_at() -> None:
    assert {path.name for path in PRODUCERS} >= {"keys.py", "contract.py", "accepting.py", "draw.py"}
    assert {path.name for path in WORKER} >= {"batch.py", "consumer.py"}
    assert "sqlalchemy" in {name for _, name in imported(PROJECT / "producers" / "storage" / "engines.py")}


@pytest.mark.parametrize("path", PRODUCERS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_producers_import_nothing_from_behind_the_broker(path: Path) -> None:
    wrong = [(line, name) for line, name in imported(path) if top(name) in BEHIND_THE_BROKER]
    assert wrong == []


@pytest.mark.process
def test_a_web_process_loads_no_celery() -> None:
    """Nor does any library that producers use bring it along. One interpreter, which says what each module loads."""
    modules = sorted(file_name(path) for path in PRODUCERS)
    script = (
        "import importlib, sys\n"
        f"for module in {modules}:\n"
        "    before = set(sys.modules)\n"
        "    importlib.import_module(module)\n"
        "    for name in set(sys.modules) - before: print(module + '>' + name)\n"
    )
    loaded = [word.split(">") for word in python(script)]
    assert {name for _, name in loaded} >= set(modules)
    # billiard comes with kombu, which imports it where it is installed
    assert [it for it in loaded if top(it[1]) in BEHIND_THE_BROKER - {"billiard"}] == []


PURE = sorted(file_name(path) for path in (PROJECT / "producers" / "domain").rglob("*.py"))


@pytest.mark.process
@pytest.mark.parametrize("module", PURE)
def test_the_pure_modules_load_nothing_that_reaches_outside(module: str) -> None:
    loaded = set(python(f"import sys\nbefore = set(sys.modules)\nimport {module}\nprint(*set(sys.modules) - before)"))
    assert module in loaded
    assert {name for name in loaded if name in OUTWARD or name.partition(".")[0] in OUTWARD} == set()
    # of the project just the other pure ones
    assert {name for name in loaded if name.startswith("tombola.")} <= {"tombola.producers", *PURE}


def test_no_import_runs_upwards_nor_in_a_circle() -> None:
    """Between rooms: a folder, or a file that lies in none. Their order is one that imports alone decide."""
    files = {file_name(path): path for path in [*PRODUCERS, *WORKER, *MIGRATIONS]}
    above: dict[str, set[str]] = {}
    for name, path in files.items():
        for _, other in imported(path):
            # What tombola.worker and tombola.producers offer under their own names is for those outside.
            if other in files and room(other) != room(name) and other.count(".") > 1 and name.count(".") > 1:
                above.setdefault(room(name), set()).add(room(other))
    order = list(graphlib.TopologicalSorter(above).static_order())  # raises CycleError
    low, middle, high = (
        order.index(f"tombola.{it}") for it in ("producers.domain", "producers.storage", "worker.settle")
    )
    assert low < middle < high
    for lower, upper in (("producers", ("worker", "migrations")), ("migrations", ("worker",))):
        wrong = {(a, b) for a, below in above.items() if top(a) == lower for b in below if top(b) in upper}
        assert wrong == set()


def room(name: str) -> str:
    """That of tombola.producers.domain.keys is tombola.producers.domain; tombola.producers.entry is one by itself."""
    parts = name.split(".")
    return name if len(parts) < 4 else ".".join(parts[:3])


@pytest.mark.process
def test_what_reaches_outside_would_be_noticed() -> None:
    loaded = python("import sys\nimport tombola.producers.storage.engines\nprint(*sys.modules)")
    assert {"sqlalchemy", "pymysql", "socket"} <= set(loaded)


LARGE = {"sqlalchemy", "alembic", "redis", "kombu", "celery", "litestar", "starlette", "starlette_admin", "pydantic"}


@pytest.mark.process
@pytest.mark.parametrize(
    ("command", "needed"),
    [
        ("--version", set()),
        ("enqueue", {"sqlalchemy", "redis", "pydantic"}),
        ("dead-letters", {"sqlalchemy", "redis", "pydantic"}),
        ("gateway", {"sqlalchemy", "redis", "pydantic"}),  # and more when it starts
        ("audit", {"sqlalchemy", "redis", "pydantic"}),
    ],
)
def test_a_command_imports_what_it_uses(command: str, needed: set[str]) -> None:
    """All of it together takes two seconds, each time that somebody looks for something."""
    words = [command] if command.startswith("-") else [command, "--help"]
    script = (
        f"import sys\nfrom tombola.worker.cli import app\ntry: app({words})\nexcept SystemExit: print('', *sys.modules)"
    )
    loaded = python(script)
    assert {name for name in loaded if name in LARGE} == needed


# Outside the base: rooms of producers that only the gateway and the console use, or processes of ours.
NOT_BASE = ("producers.gateway", "producers.web.protocol", "producers.telemetry.logs", "producers.telemetry.metrics")
# Any other module of worker, and all migrations, are of the role `worker`.
NOT_WORKER = ("worker.console", "worker.operators.users", "worker.cli.users", "worker.embedded.fake_redis")
BLOCKED = """
import importlib, importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def installed_with(*extras: str) -> set[str]:
    """Every distribution that a role's users install: pyproject.toml's, and what these ask for themselves."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(it) for it in project["dependencies"]]
    wanted += [Requirement(it) for extra in extras for it in project["optional-dependencies"][extra]]
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    while wanted:
        it = wanted.pop()
        for extra in ("", *it.extras):
            if (key := (canonical(it.name), extra)) in seen or (it.marker and not it.marker.evaluate({"extra": ""})):
                continue
            seen.add(key)
            found.add(key[0])
            try:
                asked = distribution(it.name).requires or []
            except PackageNotFoundError:
                continue
            wanted += [
                Requirement(name.partition(";")[0])
                for name in asked
                if (marker := Requirement(name).marker) is None or marker.evaluate({"extra": extra})
            ]
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def blocked_without(*extras: str) -> str:
    """The head of a script that finds nothing but what these roles install."""
    there = installed_with(*extras)
    blocked = {
        module
        for module, brings in packages_distributions().items()
        if module != "tombola" and not there & {canonical(it) for it in brings}
    }
    assert len(blocked) > 20
    return BLOCKED.format(blocked=blocked)


def of_role(role: str, name: str) -> bool:
    """Whether a module is to be importable with that role alone."""
    name = name.removeprefix("tombola.")
    if role == "base":
        return name.startswith("producers") and not name.startswith(NOT_BASE)
    if role == "gateway":
        return name.startswith("producers")
    if role == "console":
        return name.startswith(("worker.console", "worker.operators", "worker.cli.users"))
    return name.startswith(("worker", "migrations")) and not name.startswith((*NOT_WORKER, "worker.__main__"))


@pytest.mark.process
@pytest.mark.parametrize("role", ["base", "gateway", "console", "worker"])
def test_a_role_imports_what_it_installs(role: str) -> None:
    """One that has more in its environment, as ours has, would not notice."""
    modules = [it for it in map(file_name, [*PRODUCERS, *WORKER, *MIGRATIONS]) if of_role(role, it)]
    # Alembic runs the one, and the other makes an app from settings, which there are none of.
    modules = [it for it in modules if it not in ("tombola.migrations.env", "tombola.worker.celery")]
    script = f"for module in {modules}: print(importlib.import_module(module).__name__)"
    assert python(blocked_without(*(() if role == "base" else (role,))) + script) == modules


def test_the_base_is_small() -> None:
    base = installed_with()
    assert base >= {"kombu", "redis", "sqlalchemy", "pymysql", "pydantic-settings"}
    assert not base & {"celery", "alembic", "litestar", "starlette", "uvicorn", "prometheus-client", "structlog"}


def tombola(*words: str) -> subprocess.CompletedProcess[str]:
    """The command where only the base is installed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TOMBOLA_")}
    environment["TOMBOLA_DATABASE_URL"] = "sqlite:////nowhere/tombola.db"
    script = f"sys.argv = {['tombola', *words]}\nfrom tombola.worker.cli import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", blocked_without() + script],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.process
@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["up", "--draws", "0", "--exit"], "embedded"),
        (["relay"], "worker"),
        (["dead-letters", "list", "--help"], "worker"),
        (["legacy", "inspect"], "worker"),
        (["gateway", "--port", "0"], "gateway"),
        (["console", "--port", "0"], "console"),
        (["user", "list"], "console"),
    ],
    ids=lambda it: it if isinstance(it, str) else it[0],
)
def test_a_command_whose_extra_is_missing_names_it(words: list[str], extra: str) -> None:
    done = tombola(*words)
    assert done.returncode == 1, done.stdout
    assert done.stdout == ""
    assert re.fullmatch(
        rf"error: `tombola {words[0]}` needs \w+, which is not installed: pip install 'tombola\[{extra}\]'\n",
        done.stderr,
    )


@pytest.mark.process
def test_the_command_works_with_the_base_alone() -> None:
    from tombola.worker.cli import EXTRAS, MODULES

    listed = tombola("--help")
    assert listed.returncode == 0, listed.stderr
    assert all(re.search(rf"^\W*{name}\b", listed.stdout, re.MULTILINE) for name in MODULES)
    assert tombola("--version").stdout.startswith("tombola ")
    names = sorted(MODULES.keys() - EXTRAS.keys())
    script = (
        "from tombola.worker.cli import main\n"
        f"for name in {names}:\n"
        "    sys.argv = ['tombola', name, '--help']\n"
        "    try: main()\n"
        "    except SystemExit as done: print(f'{name}={done.code}')\n"
    )
    printed = python(blocked_without() + script)  # one interpreter: most of a call is its start
    assert {it for it in printed if it.endswith("=0")} == {f"{name}=0" for name in names}, printed
    done = tombola("transactions", "s-1")  # it comes as far as the database, which is not there
    assert done.stderr == "error: the SQLite file cannot be opened: check the folder in TOMBOLA_DATABASE_URL\n"


@pytest.mark.process
def test_every_public_name_is_there() -> None:
    names = python("from tombola import producers\nprint(*producers.__all__)")
    assert (
        python(
            "from tombola import producers\nprint(*[getattr(producers, name).__name__ for name in producers.__all__])"
        )
        == names
    )


def test_nobody_imports_the_command_line() -> None:
    """It stands on top of everything else: whoever needs something from it wants it moved."""
    for path in [*PRODUCERS, *WORKER]:
        if path.parent.name != "cli" and path.name != "__main__.py":
            assert [name for _, name in imported(path) if name.startswith("tombola.worker.cli")] == [], path


@pytest.mark.parametrize("path", [*PRODUCERS, *WORKER], ids=lambda path: str(path.relative_to(PROJECT)))
def test_no_engine_is_made_at_import(path: Path) -> None:
    """An import that opens connections cannot be configured, and shares them across forks."""
    makers = {"open_engine", "create_engine", "Redis", "from_url", "Settings.from_env", "Connection"}
    tree = ast.parse(path.read_text())
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign | ast.Expr) and statement.value is not None:
            called = {ast.unparse(node.func) for node in ast.walk(statement.value) if isinstance(node, ast.Call)}
            assert not {name for name in called if name in makers or name.rpartition(".")[2] in makers}, path
