"""Errors as OpenAI's clients understand them."""

from __future__ import annotations

from typing import Any

KIND_OF_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


LONGEST_MESSAGE, LONGEST_PARAM = 600, 120
"""The most characters of an error: a client may have sent megabytes."""


class ApiError(Exception):
    """A request was refused or failed.

    Attributes:
        status: HTTP status.
        message: What was wrong and what to do.
        param: The field of the body that was wrong.
        code: A word that programs can compare.
        headers: Headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        """Returns the error as JSON."""
        return error_body(self.status, self.message, param=self.param, code=self.code)


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Returns an error in OpenAI's form."""
    kind = KIND_OF_STATUS.get(status, "invalid_request_error" if status < 500 else "server_error")
    param = None if param is None else _shortened(param, LONGEST_PARAM)
    return {"error": {"message": _shortened(message, LONGEST_MESSAGE), "type": kind, "param": param, "code": code}}


def _shortened(text: str, length: int) -> str:
    """Leaves out the middle of a text: what is wrong comes first, what to do comes last."""
    return text if len(text) <= length else f"{text[: length // 2]} … {text[-length // 2 :]}"


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Returns the error for a request with something that is not accepted."""
    return ApiError(400, message, param=param, code=code)
