"""The boundary is the broker: what stands before it never needs what stands behind it, and the pure stays pure."""

import ast
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, anywhere in it: line and full name."""
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
    assert {path.name for path in PRODUCERS} >= {"keys.py", "contract.py", "requests.py", "draw.py"}
    assert {path.name for path in WORKER} >= {"batch.py", "consumer.py"}
    assert "sqlalchemy" in {name for _, name in imported(PROJECT / "producers" / "storage" / "database.py")}


@pytest.mark.parametrize("path", PRODUCERS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_producers_import_nothing_from_behind_the_broker(path: Path) -> None:
    wrong = [(line, name) for line, name in imported(path) if top(name) in BEHIND_THE_BROKER]
    assert wrong == []


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


def test_what_reaches_outside_would_be_noticed() -> None:
    loaded = python("import sys\nimport tombola.producers.storage.database\nprint(*sys.modules)")
    assert {"sqlalchemy", "pymysql", "socket"} <= set(loaded)


LARGE = {"sqlalchemy", "alembic", "redis", "kombu", "celery", "litestar", "starlette", "starlette_admin", "pydantic"}


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
