"""JSON answers that may be kept but are asked for again: an ETag over the content, and 304 where the caller has it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from backend.app.core.compact_json import compact_json


@dataclass(frozen=True, slots=True)
class Representation:
    """A document's bytes and their ETag."""

    body: bytes
    etag: str

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Representation:
        """A document as it is sent."""
        body = compact_json(document).encode()
        return cls(body, f'"{hashlib.sha256(body).hexdigest()[:32]}"')

    def response(self, request: Request) -> Response:
        """The whole of it, or 304 for a request that names its ETag (RFC 9110 13.1.2)."""
        # Private: it is about one user. No-cache: it may be kept, but asked for again, so a revocation shows at once.
        headers = {"ETag": self.etag, "Cache-Control": "private, no-cache"}
        known = request.headers.get("if-none-match")
        if known is not None:
            tags = [tag.strip().removeprefix("W/") for tag in known.split(",")]
            if self.etag in tags or "*" in tags:
                return Response(status_code=304, headers=headers)
        return Response(self.body, media_type="application/json", headers=headers)
