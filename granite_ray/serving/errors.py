"""What a caller is told when there is no answer: OpenAI's shape, no path, no trace, no text."""

from typing import Any

from granite_ray.serving.calls import Refusal

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
RETRY_S = 1
"""When to come back where nothing better is known."""


class ApiError(Exception):
    """A refusal on its way to the caller.

    Args:
        status: The HTTP status.
        message: What is wrong and what to do; no text of a document, no path, no trace.
        code: A short name for programs.
        param: The field of the request that is meant.
        retry_after_s: Whole seconds after which the same request may do.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """The response's body."""
        error = {
            "message": self.message,
            "type": TYPES.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """The response's own headers."""
        if self.status == 401:
            return {"WWW-Authenticate": 'Basic realm="granite-ray", charset="UTF-8"'}
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


def unavailable(message: str = "No replica can answer now. Try again.") -> ApiError:
    """Return the error of a replica that is gone, or not there yet."""
    return ApiError(503, message, "unavailable", retry_after_s=RETRY_S)


def failed() -> ApiError:
    """Return the error of a bug of ours, of which the log knows more."""
    return ApiError(500, "The server failed. Try again.", "server_error")


def refused(refusal: Refusal) -> ApiError:
    """Return a replica's refusal as an error."""
    retry = RETRY_S if refusal.is_transient else None
    return ApiError(refusal.status, refusal.message, refusal.code, retry_after_s=retry)
