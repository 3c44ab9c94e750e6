"""What is to be done for a batch: lines of requests or documents, in pieces that are stored whole.

A piece is a few units; a unit is one request or one document. Nothing here waits or tries again.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from granite_ray.serving.gateway import Gateway

PIECE_SIZE = 16

Unit = Callable[[bool], Awaitable[Any]]
"""Answers one request or document; True says that it has killed its replicas: it only fails."""


class UnusableInputError(Exception):
    """The input cannot be a batch; `problems` say why, without any text of it."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(problems[0])
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Output:
    """The files of a batch that has ended, where there is something in them."""

    results: bytes | None
    results_name: str
    errors: bytes | None = None


class BatchWork(Protocol):
    """One batch's work; methods but `units`' own calls block."""

    num_units: int
    pieces: list[str]
    """Names of the pieces, in their order; they mean the same after a restart."""

    async def answer_together(self, piece: str) -> Sequence[Any] | None:
        """Answer a piece by one call, where there is such a call."""
        ...

    def units(self, piece: str) -> Sequence[Unit]:
        """Return the units of a piece."""
        ...

    def encode(self, piece: str, answers: Sequence[Any]) -> bytes:
        """Return the answers of a piece's units as they are stored."""
        ...

    def count(self, data: bytes) -> tuple[int, int]:
        """Return how many units of a stored piece are completed and failed."""
        ...

    def assemble(self, stored: Mapping[str, bytes], unfinished: str | None) -> Output:
        """Join stored pieces; `unfinished` is the error of those that are missing."""
        ...


def check_number(number: int, gateway: Gateway) -> None:
    """Raise UnusableInputError for fewer or more units than a batch may have."""
    most = gateway.config.serve.max_batch_requests
    if not 0 < number <= most:
        raise UnusableInputError([f"The file has {number:,} entries; 1 to {most:,} make a batch."])
