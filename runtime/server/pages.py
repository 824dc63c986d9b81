"""How pages for people leave the server: whole, with nothing from elsewhere, and kept to that."""

import base64
import hashlib
import re

from fastapi.responses import HTMLResponse


def page_response(page: str) -> HTMLResponse:
    """An answer with ``page``, which a browser lets load nothing and talk to this server alone."""
    return HTMLResponse(
        page,
        headers={
            "Content-Security-Policy": content_policy(page),
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        },
    )


def content_policy(page: str) -> str:
    """A Content-Security-Policy that lets ``page`` run its own style and script and nothing else.

    Both are named by their hashes, so that no text which slips into the page could ever run; the
    page may talk to this server alone.
    """

    def hashes(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        named = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
        return " ".join(named) or "'none'"

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
