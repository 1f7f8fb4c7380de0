"""ASGI middleware around every route: security headers, access log with metrics, and a limit on request bodies."""

import logging
import time
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.api.errors import INTERNAL_ERROR, ApiError, error_response
from deploy.metrics import Recorder

logger = logging.getLogger(__name__)
access_log = logging.getLogger("meanflow.access")

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# FastAPI's documentation page starts with an inline script.
DOCS_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
CLIENT_DISCONNECTED = 499
"""Status in log and metrics when the caller disconnected before the response (nginx's number)."""


def route_path(scope: Scope) -> str | None:
    """The path template of the route that handles a request; None if no route matches."""
    return getattr(scope.get("route"), "path", None)


@dataclass
class SecurityHeaders:
    """Adds security headers, and `Cache-Control: no-store` unless the route sets its own."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(SECURITY_HEADERS)
                is_docs = (route_path(scope) or scope["path"]) in ("/docs", "/redoc")
                headers["Content-Security-Policy"] = DOCS_POLICY if is_docs else PAGE_POLICY
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self.app(scope, receive, send_with_headers)


@dataclass
class AccessLog:
    """Writes one line of the access log and the metrics of each request; answers an unexpected error with a 500.

    Routes add to the line through `request.state.log`. It contains no body and no query.
    """

    app: ASGIApp
    recorder: Recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        details: dict[str, object] = {}
        scope.setdefault("state", {})["log"] = details
        status = None

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note_status)
        except Exception as error:
            if status is not None:  # part of the response is already sent
                raise
            # Starlette's own handler runs outside the middleware: its response would get no headers and no log line.
            logger.error("a request failed", exc_info=error)
            response = error_response(ApiError(500, INTERNAL_ERROR))
            await response(scope, receive, send_and_note_status)
        finally:
            self._record(scope, status or CLIENT_DISCONNECTED, time.perf_counter() - started, details)

    def _record(self, scope: Scope, status: int, seconds: float, details: dict[str, object]) -> None:
        route = route_path(scope) or "other"  # each distinct path would create a time series
        self.recorder.record(
            "meanflow_requests_total", tags={"route": route, "method": scope["method"], "status": str(status)}
        )
        self.recorder.record("meanflow_request_seconds", seconds, tags={"route": route})
        line = {
            "method": scope["method"],
            "route": route,
            "status": status,
            "milliseconds": round(1000.0 * seconds, 1),
            "client": (scope.get("client") or ("unknown",))[0],
            **details,
        }
        access_log.info("request", extra=line)


@dataclass
class BodyLimit:
    """Answers a larger body with 413. FastAPI's max_body_size would answer in plain text."""

    app: ASGIApp
    max_body_bytes: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        num_received = 0

        async def limited_receive() -> Message:
            nonlocal num_received
            message = await receive()
            num_received += len(message.get("body", b""))
            if num_received > self.max_body_bytes:
                raise HTTPException(413, f"the request body may have at most {self.max_body_bytes} bytes")
            return message

        await self.app(scope, limited_receive, send)
