"""Errors in OpenAI's shape: the exception, its response, and readable validation errors."""

import math
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from deploy.api.schema import ErrorBody, ErrorResponse

# A body with many unknown fields has one validation error per field; the answer lists this many.
MAX_VALIDATION_ERRORS = 10
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
DESCRIPTIONS = {
    400: "A field has a value that this model does not support; `param` names the field.",
    401: "Missing or unknown API key.",
    404: "Not found.",
    413: "The body is too large.",
    422: "A field is missing, unknown, or has a wrong type or range; `param` names the field.",
    429: "Too many images are queued, or the rate limit is exceeded; Retry-After says when to try again.",
    500: "Internal server error.",
    503: "No replica is available; the same request may succeed later.",
    504: "Deadline exceeded.",
}


INTERNAL_ERROR = "internal server error; see the server's log"


class ApiError(Exception):
    """An error that the caller receives in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_seconds = retry_after_seconds


def invalid_value(param: str, message: str) -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, f"{param}: {message}", "invalid_value", param)


def error_body(error: ApiError) -> ErrorResponse:
    """The body of the response to an error."""
    default_type = "invalid_request_error" if error.status < 500 else "server_error"
    return ErrorResponse(
        error=ErrorBody(
            message=error.message,
            type=ERROR_TYPES.get(error.status, default_type),
            param=error.param,
            code=error.code,
        )
    )


def error_response(error: ApiError) -> JSONResponse:
    """The response to an error. An infinite retry_after_seconds gives no Retry-After header."""
    headers = {}
    if error.retry_after_seconds is not None and math.isfinite(error.retry_after_seconds):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_seconds)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error).model_dump(), status_code=error.status, headers=headers)


def explain_validation_error(error: RequestValidationError) -> ApiError:
    """A 422 with one readable sentence per invalid field; `param` is the first field."""
    messages, fields = [], []
    for detail in error.errors():
        # The location is ("body", field, ...), followed by the union members that pydantic tried.
        path = [str(part) for part in detail["loc"][1:] if not str(part).startswith(("constrained-", "function-"))]
        if detail["type"] == "json_invalid":
            path.clear()  # the location is an offset in the text
        while path and path[-1] in ("int", "str"):
            path.pop()
        field = ".".join(path)
        fields.append(field or None)
        message = detail["msg"]
        if detail["type"] == "model_attributes_type" and not path:
            message = "expected a JSON object; send the header Content-Type: application/json"
        messages.append(f"{field or 'body'}: {message}")
    messages = list(dict.fromkeys(messages))
    if len(messages) > MAX_VALIDATION_ERRORS:
        messages[MAX_VALIDATION_ERRORS:] = [f"and {len(messages) - MAX_VALIDATION_ERRORS} more"]
    return ApiError(422, "; ".join(messages), "invalid_request", next(filter(None, fields), None))


def document_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Entries of the OpenAPI document for these statuses."""
    return {status: {"model": ErrorResponse, "description": DESCRIPTIONS[status]} for status in statuses}


async def handle_api_error(request: Request, error: ApiError) -> JSONResponse:
    """FastAPI's handler for ApiError."""
    return error_response(error)


async def handle_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
    """FastAPI's handler for a request that does not fit its schema."""
    return error_response(explain_validation_error(error))


async def handle_http_error(request: Request, error: HTTPException) -> JSONResponse:
    """FastAPI's handler for errors of the router and of the middleware: 404, 405, 413."""
    response = error_response(ApiError(error.status_code, str(error.detail)))
    response.headers.update(error.headers or {})
    return response


EXCEPTION_HANDLERS: dict[Any, Any] = {
    ApiError: handle_api_error,
    RequestValidationError: handle_validation_error,
    HTTPException: handle_http_error,
}
