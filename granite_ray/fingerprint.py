"""The digest of all that can change an answer. Results of different fingerprints never mix.

What cannot change an answer (where documents lie and how they are dealt out, how many replicas run,
where results go) is left out, so that such a change can resume.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from granite_ray.config import JobConfig

ANSWERS_VERSION = 1
"""Raised with every change of our code that alters prompts, chunks, decoding or merging."""


def make_fingerprint(
    config: JobConfig, checkpoint_identity: Mapping[str, Any], output_schema: pa.Schema
) -> str:
    """Return the hex SHA-256 of all that can change an answer.

    The order inside an object counts: properties of a schema are written in their order, and so are
    the labels of a tree.
    """
    facts = {
        "answers_version": ANSWERS_VERSION,
        "checkpoint": dict(sorted(checkpoint_identity.items())),
        "task": config.task.model_dump(mode="json", by_alias=True),
        "text_column": config.source.text_column,
        "id_column": config.source.id_column,
        "chunking": config.chunking.model_dump(mode="json"),
        "model": config.model.model_dump(
            mode="json", include={"dtype", "load_format", "max_model_len"}
        ),
        "is_fake": config.engine.backend == "fake",
        "output_schema": [(field.name, str(field.type), field.nullable) for field in output_schema],
    }
    canonical = json.dumps(facts, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
