"""Who may ask, and how often: API keys, rates, headers, and the access log."""

import hashlib
import hmac
import ipaddress
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import limits
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.metrics import Recorder
from deploy.settings import Arguments

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# FastAPI's page of the interface has its start inline; its scripts are served from here all the same.
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


def hash_key(key: str) -> str:
    """SHA-256 in hexadecimal. Keys are 256 random bits, so that no slower hash is wanted."""
    return hashlib.sha256(key.encode()).hexdigest()


def find_key(key: str, api_keys: dict[str, str]) -> str | None:
    """The name of a key, or None. Takes as long whichever it is, or none."""
    digest = hash_key(key)
    found = None
    for name, known in api_keys.items():
        if hmac.compare_digest(digest, known):
            found = name
    return found


def is_loopback(host: str | None) -> bool:
    """Whether nobody but this machine reaches a server on this host; None is no server at all."""
    if host is None or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def require_safe_exposure(arguments: Arguments, http_host: str | None) -> None:
    """Raises ValueError where everybody would reach an endpoint without keys, and nobody said that this is meant."""
    if arguments.api_keys or arguments.auth == "none" or is_loopback(http_host):
        return
    raise ValueError(
        f"Serve's HTTP host is {http_host}, which others reach, and there are no API keys; give api_keys "
        f"(python -m deploy.keys NAME makes one), set http_options.host to 127.0.0.1, or say auth=none"
    )


class RateLimiter:
    """Images per caller, over sliding windows, in this process."""

    def __init__(self, rate: str | None) -> None:
        self._rates = [] if rate is None else limits.parse_many(rate)
        self._storage = MemoryStorage()
        self._limiter = SlidingWindowCounterRateLimiter(self._storage)

    def seconds_until_allowed(self, caller: str, num_images: int) -> float | None:
        """None where the images are within the rates, and counted; else how long until they may be.

        Infinite where the rates never allow so many at once.
        """
        if any(num_images > rate.amount for rate in self._rates):
            return math.inf
        full = [rate for rate in self._rates if not self._limiter.test(rate, caller, cost=num_images)]
        if full:
            return max(max(self._seconds_until_room(rate, caller, num_images) for rate in full), 0.1)
        for rate in self._rates:
            self._limiter.hit(rate, caller, cost=num_images)
        return None

    def _seconds_until_room(self, rate: limits.RateLimitItem, caller: str, num_images: int) -> float:
        """How long until so many fit. What a window counted fades evenly over the window after it."""
        window, most = rate.get_expiry(), rate.amount - num_images
        before, _, now, expires_in = self._storage.get_sliding_window(rate.key_for(caller), window)
        fades_in = expires_in - window
        if now <= most and before:
            return fades_in - (most - now) * window / before
        return fades_in + window * (1.0 - most / max(now, 1))


@dataclass
class Guard:
    """ASGI middleware: a limit of bodies, security headers, one line of the access log and the figures per request.

    What endpoints put into `scope["state"]["log"]` stands in the line too. Bodies and queries never do.
    """

    app: ASGIApp
    max_body_bytes: int
    recorder: Recorder
    access_log: logging.Logger
    on_fault: Callable[[Exception], Response]
    """The answer to a request that raised. Starlette's own place for it lies outside of this guard."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        about: dict[str, object] = {}
        scope.setdefault("state", {})["log"] = about
        status, received = 0, 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            # FastAPI's own limit answers in plain text, past our shape of errors.
            if received > self.max_body_bytes:
                raise HTTPException(413, f"a body may have at most {self.max_body_bytes} bytes")
            return message

        async def guarded_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
                route = getattr(scope.get("route"), "path", scope["path"])
                headers["Content-Security-Policy"] = DOCS_POLICY if route in ("/docs", "/redoc") else PAGE_POLICY
                if "cache-control" not in headers:
                    headers["Cache-Control"] = "no-store"
            await send(message)

        try:
            await self.app(scope, limited_receive, guarded_send)
        except Exception as error:
            if status:  # half an answer is out already
                raise
            await self.on_fault(error)(scope, receive, guarded_send)
        finally:
            seconds = time.perf_counter() - began
            # A path that is no route is the caller's text: as a tag, each would be a series of its own.
            route = getattr(scope.get("route"), "path", None) or "other"
            self.recorder.record(
                "meanflow_requests_total",
                tags={"route": route, "method": scope["method"], "status": str(status or 499)},
            )
            self.recorder.record("meanflow_request_seconds", seconds, tags={"route": route})
            line = {
                "method": scope["method"],
                "route": route,
                "status": status or 499,  # the caller had gone
                "milliseconds": round(1000.0 * seconds, 1),
                "client": (scope.get("client") or ("unknown",))[0],
                **about,
            }
            self.access_log.info("request", extra=line)
