"""What a stage raised, out of what Ray made of it."""

import re

import ray

from granite_ray.errors import InfrastructureError

RAY_ADVICE = re.compile(r"\nFailed to [^\n]* after \d+/\d+ attempts .*", re.DOTALL)
"""What Ray Data adds to the words of every error: how to make it try again."""


def own_error(error: BaseException) -> BaseException:
    """Return what a stage raised, out of what Ray made of it; what Ray itself raised is no bug."""
    while isinstance(error, ray.exceptions.RayTaskError):
        error = error.cause
    if isinstance(error, ray.exceptions.RayError):
        return InfrastructureError(f"Ray could not go on: {first_line(error)}")
    if error.args and isinstance(error.args[0], str):
        error.args = (RAY_ADVICE.sub("", error.args[0]), *error.args[1:])
    return error


def first_line(error: BaseException) -> str:
    """Return the first line of a message, without the colors that Ray writes into it."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return plain.partition("\n")[0] or type(error).__name__
