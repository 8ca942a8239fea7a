"""Static files: Swagger UI for /docs, from a package that brings it along, and the demo page of embedded mode."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Final

from litestar import Response, get
from litestar.exceptions import NotFoundException
from litestar.static_files import create_static_files_router

PAGE: Final = Path(__file__).parent / "page"
# Nothing from elsewhere, nothing inline: the page is its own files.
PAGE_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@get("/", include_in_schema=False, media_type="text/html")
async def show_page() -> Response[bytes]:
    return Response((PAGE / "index.html").read_bytes(), media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)


@get("/page/{name:str}", include_in_schema=False)
async def show_page_file(name: str) -> Response[bytes]:
    kinds = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
    file = PAGE / name
    if file.parent != PAGE or file.suffix not in kinds or not file.is_file():
        raise NotFoundException("no such file")
    return Response(file.read_bytes(), media_type=kinds[file.suffix], headers=PAGE_HEADERS)


def static_routes(*, with_page: bool) -> list[Any]:
    """The routes that serve files."""
    routes: list[Any] = [show_page, show_page_file] if with_page else []
    spec = importlib.util.find_spec("flask_swagger_ui")  # for its files alone: it is not imported
    if spec is not None and spec.origin is not None:
        dist = Path(spec.origin).parent / "dist"
        routes.append(create_static_files_router(path="/docs/files", directories=[dist], include_in_schema=False))
    return routes
