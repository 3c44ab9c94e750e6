"""Who may ask: API keys by name, stored as digests, with limits of their own.

A key is random and long, so a plain SHA-256 keeps it: there is nothing to guess.
"""

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from granite_ray.config import parse_section, read_values
from granite_ray.config.base import Section
from granite_ray.errors import ConfigError

KEY_PREFIX = "gr-"
LOCAL_NAME = "local"
"""The name of whoever asks where there are no keys."""


class KeyEntry(Section):
    """One key of the keys file."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
    """Who holds it; files and batches belong to this name."""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """Hex SHA-256 of the key."""
    requests_per_minute: int = Field(default=600, gt=0)
    """Requests in a minute; more get 429."""
    max_in_flight: int = Field(default=64, gt=0)
    """Requests accepted and not answered yet; more get 429."""
    max_batches: int = Field(default=100, gt=0)
    """Batches that are not done; more get 429."""


class KeysFile(Section):
    """The file that `serve.keys_path` names."""

    keys: tuple[KeyEntry, ...] = Field(min_length=1)
    """The keys; two may have one name, so that a key can be replaced without a gap."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what they may."""

    name: str
    requests_per_minute: int
    max_in_flight: int
    max_batches: int


class Keys:
    """All keys of a server; none where it answers this machine alone."""

    def __init__(self, entries: Sequence[KeyEntry]) -> None:
        self._entries = tuple(entries)

    @property
    def is_open(self) -> bool:
        """Whether there are no keys."""
        return not self._entries

    @property
    def names(self) -> frozenset[str]:
        """Everybody who may ask."""
        return frozenset(entry.name for entry in self._entries) or frozenset({LOCAL_NAME})

    def find(self, key: bytes | None) -> Caller | None:
        """Return whose key it is; it takes as long for a wrong one as for a right one."""
        digest = hashlib.sha256(key or b"").hexdigest()
        found = None
        for entry in self._entries:
            if hmac.compare_digest(digest, entry.sha256):
                found = entry
        if found is None or not key:
            return None
        return Caller(found.name, found.requests_per_minute, found.max_in_flight, found.max_batches)


LOCAL_CALLER = Caller(LOCAL_NAME, 1_000_000, 1_000_000, 1_000_000)


def load_keys(path: str | None) -> Keys:
    """Read the keys file, or have none.

    Raises:
        ConfigError: It cannot be read, or an entry is wrong.
    """
    if path is None:
        return Keys(())
    try:
        values: Mapping[str, Any] = read_values(path)
        return Keys(parse_section(KeysFile, values, Path(path).parent).keys)
    except ConfigError as error:
        raise ConfigError(f"serve.keys_path {path}: {error}") from error


def make_key(name: str) -> tuple[str, str]:
    """Return a new key, which is stored nowhere, and its entry for the keys file.

    Raises:
        ConfigError: The name cannot be one.
    """
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    digest = hashlib.sha256(key.encode()).hexdigest()
    parse_section(KeyEntry, {"name": name, "sha256": digest}, Path())
    return key, f"  - name: {name}\n    sha256: {digest}\n"


def key_of(authorization: bytes) -> tuple[bytes | None, bool]:
    """Return the key in an Authorization header, and whether a browser filled it in by itself."""
    scheme, _, value = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip(), False
    if scheme.lower() == b"basic":
        try:
            decoded = base64.b64decode(value.strip(), validate=True)
        except (binascii.Error, ValueError):
            return None, True
        return decoded.partition(b":")[2], True
    return None, False
