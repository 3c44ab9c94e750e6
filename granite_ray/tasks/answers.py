"""What a task reads out of one completion: text, or JSON."""

import json
from typing import Any, NoReturn

from granite_ray.errors import RowFailure
from granite_ray.records import Completion


def read_text(completion: Completion) -> str:
    """Return what was written, without white space around it."""
    text = completion.text.strip()
    if not text:
        raise RowFailure("empty_answer", "the model wrote nothing")
    return text


def read_json(completion: Completion) -> Any:
    """Return the JSON value that was written."""
    try:
        return json.loads(completion.text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = (
            "was cut at task.max_tokens before its end"
            if completion.finish_reason == "length"
            else "is not valid JSON"
        )
        raise RowFailure("schema_violation", f"the answer {reason}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
