"""The demo page of embedded mode, which draws from a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from litestar import Response, get
from litestar.datastructures import State
from litestar.exceptions import NotFoundException
from litestar.response import Stream

from tombola.producers.gateway.files import HEADERS, serve_file

PAGE: Final = Path(__file__).parents[1] / "page"
# The page loads its own files only, and has no inline script or style.
PAGE_HEADERS: Final = HEADERS | {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}


@get("/", include_in_schema=False)
async def show_page(state: State) -> Response[bytes] | Stream:
    return serve_file(PAGE / "index.html", PAGE_HEADERS, state.file_turns)


@get("/page/{name:str}", include_in_schema=False)
async def show_page_file(name: str, state: State) -> Response[bytes] | Stream:
    file = PAGE / name
    if file.parent != PAGE or file.suffix not in (".js", ".css", ".svg") or not file.is_file():
        raise NotFoundException("no such file")
    return serve_file(file, PAGE_HEADERS, state.file_turns)


ROUTES: Final = (show_page, show_page_file)
