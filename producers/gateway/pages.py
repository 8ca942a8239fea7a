"""Static files: Swagger UI for /docs, from a package that brings it along, and the demo page of embedded mode.

Each is read once and kept: what strangers can ask for costs no more than sending it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, Final

from litestar import Response, get
from litestar.datastructures import State
from litestar.exceptions import NotFoundException
from litestar.response import Stream

PIECE_BYTES: Final = 32 * 1024

PAGE: Final = Path(__file__).parent / "page"
DOCS: Final = Path(__file__).parent / "docs"
SWAGGER_FILES: Final = frozenset({"swagger-ui-bundle.js", "swagger-ui-standalone-preset.js", "swagger-ui.css"})
KINDS: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS: Final = {"Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
# Nothing from elsewhere, nothing inline: the page is its own files.
PAGE_HEADERS: Final = _HEADERS | {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}
# Swagger UI sets styles by itself, and has its icons in its style sheet.
DOCS_HEADERS: Final = _HEADERS | {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}


@get("/", include_in_schema=False)
async def show_page(state: State) -> Response[bytes] | Stream:
    return _file(PAGE / "index.html", PAGE_HEADERS, state.file_turns)


@get("/page/{name:str}", include_in_schema=False)
async def show_page_file(name: str, state: State) -> Response[bytes] | Stream:
    file = PAGE / name
    if file.parent != PAGE or file.suffix not in (".js", ".css", ".svg") or not file.is_file():
        raise NotFoundException("no such file")
    return _file(file, PAGE_HEADERS, state.file_turns)


@get("/docs", include_in_schema=False)
async def show_docs(state: State) -> Response[bytes] | Stream:
    return _file(DOCS / "index.html", DOCS_HEADERS, state.file_turns)


@get("/docs/files/{name:str}", include_in_schema=False)
async def show_docs_file(name: str, state: State) -> Response[bytes] | Stream:
    folder = _swagger_folder() if name in SWAGGER_FILES else DOCS
    if folder is None or name not in SWAGGER_FILES | {"docs.js"}:
        raise NotFoundException("no such file")
    return _file(folder / name, DOCS_HEADERS, state.file_turns)


def static_routes(*, with_page: bool) -> list[Any]:
    """The routes that serve files."""
    return [show_docs, show_docs_file, *([show_page, show_page_file] if with_page else [])]


def _file(path: Path, headers: dict[str, str], turns: asyncio.Lock) -> Response[bytes] | Stream:
    content, kind = _content(path), KINDS[path.suffix]
    if len(content) <= PIECE_BYTES:
        return Response(content, media_type=kind, headers=headers)
    return Stream(_pieces(content, turns), media_type=kind, headers=headers | {"Content-Length": str(len(content))})


async def _pieces(content: bytes, turns: asyncio.Lock) -> AsyncIterator[bytes]:
    """The content, a piece in each round of the event loop, whoever else reads: a draw does not wait for 50 files."""
    for start in range(0, len(content), PIECE_BYTES):
        async with turns:
            await asyncio.sleep(0)
        yield content[start : start + PIECE_BYTES]


@cache
def _content(path: Path) -> bytes:
    return path.read_bytes()


@cache
def _swagger_folder() -> Path | None:
    """Where the package lies that brings Swagger UI; None where it is not installed."""
    try:
        # As its own list names them: a second package, of Swagger UI's version 4, goes by the same name when imported.
        found = files("swagger-ui-bundle-v2") or []
    except PackageNotFoundError:
        return None
    return next((Path(str(it.locate())).parent for it in found if it.name == "swagger-ui-bundle.js"), None)
