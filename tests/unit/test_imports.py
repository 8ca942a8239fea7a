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
    *("sqlalchemy", "redis", "pymysql", "kombu", "amqp", "celery", "pydantic", "alembic", "worker.ledger.post"),
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


def python(script: str) -> list[str]:
    """The words that `script` prints in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, env={**os.environ}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_there_is_something_to_look_at() -> None:
    assert {path.name for path in PRODUCERS} >= {"keys.py", "contract.py", "requests.py", "draw.py"}
    assert {path.name for path in WORKER} >= {"batch.py", "consumer.py"}
    assert "sqlalchemy" in {name for _, name in imported(PROJECT / "producers" / "storage" / "database.py")}


@pytest.mark.parametrize("path", PRODUCERS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_producers_import_nothing_from_behind_the_broker(path: Path) -> None:
    wrong = [(line, name) for line, name in imported(path) if name.partition(".")[0] in BEHIND_THE_BROKER]
    assert wrong == []


def test_a_web_process_loads_no_celery() -> None:
    """Nor does any library that producers use bring it along. One interpreter, which says what each module loads."""
    names = (".".join(path.relative_to(PROJECT).with_suffix("").parts) for path in PRODUCERS)
    modules = sorted({name.removesuffix(".__init__") for name in names})
    script = (
        "import importlib, sys\n"
        f"for module in {modules}:\n"
        "    before = set(sys.modules)\n"
        "    importlib.import_module(module)\n"
        "    for name in set(sys.modules) - before: print(module + '>' + name)\n"
    )
    loaded = [word.split(">") for word in python(script)]
    assert {name for _, name in loaded} >= {"producers", *modules}
    # billiard comes with kombu, which imports it where it is installed
    assert [it for it in loaded if it[1].partition(".")[0] in BEHIND_THE_BROKER - {"billiard"}] == []


DOMAIN = sorted((PROJECT / "producers" / "domain").glob("[a-z]*.py"))
PURE = ["producers.domain", *(f"producers.domain.{path.stem}" for path in DOMAIN)]


@pytest.mark.parametrize("module", PURE)
def test_the_pure_modules_load_nothing_that_reaches_outside(module: str) -> None:
    loaded = set(python(f"import sys\nbefore = set(sys.modules)\nimport {module}\nprint(*set(sys.modules) - before)"))
    assert module in loaded
    assert {name for name in loaded if name in OUTWARD or name.partition(".")[0] in OUTWARD} == set()
    # of the project just the other pure ones
    assert {name for name in loaded if name.startswith(("producers.", "worker."))} <= set(PURE)


def test_no_import_runs_upwards_nor_in_a_circle() -> None:
    """Between rooms: a folder, or a file that lies in none. Their order is one that imports alone decide."""
    files = {file_name(path): path for path in [*PRODUCERS, *WORKER, *MIGRATIONS]}
    above: dict[str, set[str]] = {}
    for name, path in files.items():
        for _, other in imported(path):
            if other in files and room(other) != room(name):
                above.setdefault(room(name), set()).add(room(other))
    order = list(graphlib.TopologicalSorter(above).static_order())  # raises CycleError
    assert order.index("producers.domain") < order.index("producers.storage") < order.index("worker.settle")
    for lower, upper in (("producers", ("worker", "migrations")), ("migrations", ("worker",))):
        wrong = {(a, b) for a, below in above.items() if a.startswith(lower) for b in below if b.startswith(upper)}
        assert wrong == set()


def file_name(path: Path) -> str:
    return ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")


def room(name: str) -> str:
    """`producers.domain.keys` lies in producers.domain, `producers.entry` is a room of its own."""
    parts = name.split(".")
    return name if len(parts) < 3 else ".".join(parts[:2])


def test_what_reaches_outside_would_be_noticed() -> None:
    loaded = python("import sys\nimport producers.storage.database\nprint(*sys.modules)")
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
    script = f"import sys\nfrom worker.cli import app\ntry: app({words})\nexcept SystemExit: print('', *sys.modules)"
    loaded = python(script)
    assert {name for name in loaded if name in LARGE} == needed


def test_every_public_name_is_there() -> None:
    assert python("import producers\nprint(*[getattr(producers, name).__name__ for name in producers.__all__])") == (
        python("import producers\nprint(*producers.__all__)")
    )


def test_nobody_imports_the_command_line() -> None:
    """It stands on top of everything else: whoever needs something from it wants it moved."""
    for path in [*PRODUCERS, *WORKER]:
        if path.parent.name != "cli" and path.name != "__main__.py":
            assert [name for _, name in imported(path) if name.startswith("worker.cli")] == [], path


@pytest.mark.parametrize("path", [*PRODUCERS, *WORKER], ids=lambda path: str(path.relative_to(PROJECT)))
def test_no_engine_is_made_at_import(path: Path) -> None:
    """An import that opens connections cannot be configured, and shares them across forks."""
    makers = {"open_engine", "create_engine", "Redis", "from_url", "Settings.from_env", "Connection"}
    tree = ast.parse(path.read_text())
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign | ast.Expr) and statement.value is not None:
            called = {ast.unparse(node.func) for node in ast.walk(statement.value) if isinstance(node, ast.Call)}
            assert not {name for name in called if name in makers or name.rpartition(".")[2] in makers}, path
