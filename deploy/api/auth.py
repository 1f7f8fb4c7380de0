"""Checks API keys, and refuses to start an endpoint that other machines can reach without a key."""

import hashlib
import hmac
import ipaddress

from fastapi import Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from deploy.api.errors import ApiError
from deploy.settings import Arguments

bearer = HTTPBearer(auto_error=False, description="API key; required if the endpoint has keys.")


def hash_key(key: str) -> str:
    """SHA-256 in hexadecimal. Keys are 256 random bits, so no slow hash is needed."""
    return hashlib.sha256(key.encode()).hexdigest()


def find_key_name(key: str, api_keys: dict[str, str]) -> str | None:
    """The name of a key, or None if it is unknown. The comparison takes constant time.

    api_keys: {name: SHA-256 of the key}.
    """
    digest = hash_key(key)
    match = None
    for name, known_digest in api_keys.items():
        if hmac.compare_digest(digest, known_digest):
            match = name
    return match


def identify_caller(
    request: Request, credentials: HTTPAuthorizationCredentials | None, api_keys: dict[str, str]
) -> str:
    """The caller's identity for rate limits: the name of the API key or, without keys, the client's address.

    Raises ApiError 401 for a missing or unknown key.
    """
    if not api_keys:
        return f"address {request.client.host if request.client else 'unknown'}"
    name = find_key_name(credentials.credentials, api_keys) if credentials else None
    if name is None:
        if credentials:
            received = "an unknown one"
        else:
            received = "another scheme than Bearer" if "authorization" in request.headers else "none"
        raise ApiError(
            401, f"expected an API key as `Authorization: Bearer KEY`, but got {received}", "invalid_api_key"
        )
    request.state.log["key"] = name
    return f"key {name}"


def is_loopback(host: str | None) -> bool:
    """Whether only this machine can reach a server on this host. None: there is no server."""
    if host is None or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_open_to_others(arguments: Arguments, http_host: str | None) -> bool:
    """Whether other machines can reach an endpoint without keys, although auth is not "none"."""
    return not (arguments.api_keys or arguments.auth == "none" or is_loopback(http_host))


def require_safe_exposure(arguments: Arguments, http_host: str | None) -> None:
    """Raises ValueError if other machines can reach an endpoint without keys, unless auth is "none"."""
    if is_open_to_others(arguments, http_host):
        raise ValueError(
            f"Serve's HTTP host {http_host} is reachable from other machines, and there are no API keys; set api_keys "
            f"(meanflow keys NAME makes one), set http_options.host to 127.0.0.1, or set auth=none"
        )
