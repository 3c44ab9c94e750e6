"""The `serve` section, and the file that `granite-ray serve` takes: how the endpoints behave.

A job's own file will do too: its task is then served under the name `default`.
"""

from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from granite_ray.config.base import Section
from granite_ray.config.task import TaskConfig

DEFAULT_TASK = "default"
"""The name under which a job's own task is served."""
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})

TaskName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]


class ServeConfig(Section):
    """How `granite-ray serve` answers over HTTP; jobs take no notice of it."""

    host: str = "127.0.0.1"
    """Address to listen on; one that others can reach needs `serve.keys_path`."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    keys_path: str | None = None
    """YAML file with the names, SHA-256 digests and limits of API keys (`granite-ray serve
    --new-key NAME` writes an entry); without it only this machine is answered."""
    store_path: str = "out/serve"
    """Folder, local or `s3://bucket/…`, for uploaded files and batches; a restart resumes them."""
    tasks: dict[TaskName, TaskConfig] = Field(default_factory=dict)
    """Tasks by name, for requests that only say which: templates may have logic here."""
    max_in_flight: int = Field(default=256, gt=0)
    """Requests accepted and not answered yet, of all callers; more get 429 with Retry-After."""
    max_batch_in_flight: int = Field(default=32, gt=0)
    """Requests and documents of batches that are with the replicas at once; keep it below their
    `engine.max_num_seqs`, or interactive requests wait until one of them ends."""
    max_body_mib: float = Field(default=8.0, gt=0)
    """MiB of a request's body, files left out; more gets 413."""
    max_file_mib: float = Field(default=100.0, gt=0)
    """MiB of an uploaded file."""
    max_documents: int = Field(default=32, gt=0)
    """Documents that one request answers at once; a request with more becomes a batch."""
    max_tokens: int = Field(default=4096, gt=0)
    """Longest answer that a request may ask for, in tokens."""
    max_batch_requests: int = Field(default=50_000, gt=0)
    """Requests, or documents, in one batch."""
    timeout_s: float = Field(default=300.0, gt=0)
    """Seconds after which a request that is not a batch ends with 504, and its work with it."""
    body_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds a caller may take to send a body; files get ten times as long."""
    batch_hours: float = Field(default=24.0, gt=0)
    """Hours after which what is left of a batch expires."""
    drain_s: float = Field(default=30.0, ge=0)
    """Seconds that requests in flight get to finish when the server stops or a replica goes."""

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach `host`."""
        return self.host in LOOPBACK_HOSTS or self.host.startswith("127.")

    @model_validator(mode="after")
    def _keys_where_reachable(self) -> "ServeConfig":
        if not self.is_local and self.keys_path is None:
            raise ValueError(
                f"serve.host {self.host} can be reached by others, and there are no keys. Set "
                "serve.keys_path (granite-ray serve --new-key NAME writes an entry), or keep "
                "serve.host 127.0.0.1"
            )
        return self
