"""Every exception of the project, as one small tree; each carries its exit code.

`RowFailure` is data: it becomes a row that says what is wrong with one document. Everything else
stops the job, which can then resume from what is committed.
"""

from typing import ClassVar, Literal

ErrorType = Literal[
    "null_text",
    "null_id",
    "empty_text",
    "invalid_text",
    "invalid_json",
    "invalid_column",
    "too_long",
    "empty_answer",
    "schema_violation",
    "worker_death",
]
"""Why a row failed: a closed list."""


class GraniteRayError(Exception):
    """Base of what the project raises on purpose."""

    exit_code: ClassVar[int] = 1


class ConfigError(GraniteRayError):
    """The config, the input listing or the checkpoint is refused before anything starts."""

    exit_code = 2


class TooManyFailedError(GraniteRayError):
    """More documents failed than `job.max_failed_fraction` allows."""

    exit_code = 4


class CorruptInputError(GraniteRayError):
    """An input file cannot be read and `source.on_bad_file` is `fail`."""

    exit_code = 4


class ConflictError(GraniteRayError):
    """The output is of another fingerprint or source root, or too much input vanished."""

    exit_code = 5


class LeaseError(GraniteRayError):
    """Another run holds the lease of this output, or took it over."""

    exit_code = 6


class InfrastructureError(GraniteRayError):
    """Something outside the job broke; the same command may work later and resumes."""

    exit_code = 75


class StorageError(InfrastructureError):
    """A storage call failed for good: no space, no route, no answer in time."""


class StorageDeniedError(StorageError):
    """The storage refuses access. At start this is a `ConfigError`; in a run it is exit 75."""


class InputChangedError(InfrastructureError):
    """An input file is no longer the one that was planned."""


class RowFailure(Exception):  # noqa: N818 - the glossary's word: it is data, not a broken machine
    """An error that belongs to one document; it becomes the document's row.

    `message` holds no text of the document.
    """

    def __init__(self, error_type: ErrorType, message: str) -> None:
        super().__init__(message)
        self.error_type: ErrorType = error_type
        self.message = message

    def __reduce__(self) -> tuple[type["RowFailure"], tuple[ErrorType, str]]:
        return RowFailure, (self.error_type, self.message)
