"""The web page at `/`: one document with its own style and script, and nothing from outside."""

import secrets
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

FOLDER = Path(__file__).parent / "page"


def page_route() -> APIRouter:
    """Return the route; like every other it is behind the key."""
    html = (FOLDER / "page.html").read_text(encoding="utf-8")
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    page = html.replace("SCRIPT", script)
    router = APIRouter(include_in_schema=False)

    @router.get("/", response_class=HTMLResponse)
    async def show() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        return HTMLResponse(page.replace("NONCE", nonce), headers=_headers(nonce))

    return router


def _headers(nonce: str) -> dict[str, str]:
    policy = {
        "default-src": "'none'",
        "script-src": f"'nonce-{nonce}'",
        "style-src": f"'nonce-{nonce}'",
        "style-src-attr": "'unsafe-inline'",  # the width of a bar
        "connect-src": "'self'",
        "img-src": "data:",
        "form-action": "'none'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Referrer-Policy": "no-referrer",
    }
