"""Buffers are kept, grow, and stay apart."""

import torch

from granite_ray.model.workspace import Workspace

LIKE = torch.empty(0, dtype=torch.bfloat16)


def test_a_buffer_is_used_again() -> None:
    workspace = Workspace()
    first = workspace.take("x", (4, 8), LIKE)
    assert workspace.take("x", (2, 3), LIKE).data_ptr() == first.data_ptr()
    assert workspace.take("x", (8, 4), LIKE).data_ptr() == first.data_ptr()
    assert (first.shape, first.dtype) == ((4, 8), torch.bfloat16)


def test_a_buffer_grows_and_leaves_what_was_given_out_alone() -> None:
    workspace = Workspace()
    small = workspace.take("x", (4,), LIKE).fill_(1)
    large = workspace.take("x", (5,), LIKE).fill_(2)
    assert small.tolist() == [1] * 4
    assert large.tolist() == [2] * 5


def test_two_names_share_nothing() -> None:
    workspace = Workspace()
    one, other = (workspace.take(name, (16,), LIKE) for name in ("one", "other"))
    one.fill_(1)
    other.fill_(2)
    assert one.tolist() == [1] * 16


def test_a_dtype_can_be_asked_for() -> None:
    assert Workspace().take("wide", (3,), LIKE, torch.float32).dtype == torch.float32
