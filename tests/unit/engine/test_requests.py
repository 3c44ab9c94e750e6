import pytest
from hypothesis import given
from hypothesis import strategies as st

from granite_ray.engine.requests import (
    GenerateRequest,
    ScoreRequest,
    check_fits,
    cut_at_stop,
    num_positions,
    take_batch,
)
from granite_ray.errors import RowFailure
from granite_ray.records import Prompt, SamplingParams


def generate(num_prompt_tokens, max_tokens=1):
    return GenerateRequest(Prompt((7,) * num_prompt_tokens), SamplingParams(max_tokens))


def score(num_prompt_tokens, *lengths):
    return ScoreRequest(Prompt((7,) * num_prompt_tokens), [(8,) * length for length in lengths])


requests = st.lists(
    st.builds(generate, st.integers(1, 50), st.integers(1, 50))
    | st.builds(score, st.integers(1, 50), st.integers(1, 9)),
    max_size=40,
)


@given(requests, st.integers(1, 10), st.integers(1, 400))
def test_every_request_is_taken_once_within_the_limits_and_the_oldest_first(
    waiting, max_num_seqs, max_num_batched_tokens
):
    num_taken = 0
    while waiting:
        batch = take_batch(waiting, max_num_seqs, max_num_batched_tokens)
        assert batch[0] is waiting[0]
        assert len({type(request) for request in batch}) == 1
        assert len(batch) <= max_num_seqs
        padded = len(batch) * max(map(num_positions, batch))
        assert padded <= max_num_batched_tokens or len(batch) == 1
        num_left = len(waiting) - len(batch)
        waiting = [request for request in waiting if not any(request is one for one in batch)]
        assert len(waiting) == num_left
        num_taken += len(batch)


def test_requests_of_like_length_run_together():
    waiting = [generate(100), generate(5), generate(104), generate(300), generate(97)]
    batch = take_batch(waiting, max_num_seqs=3, max_num_batched_tokens=10_000)
    assert [len(request.prompt.token_ids) for request in batch] == [100, 97, 104]


def test_nothing_waits_nothing_is_taken():
    assert take_batch([], 4, 100) == []


def test_positions_count_the_longest_answer():
    assert num_positions(generate(10, 5)) == 15
    assert num_positions(score(10, 2, 7, 1)) == 17


def test_a_prompt_that_does_not_fit_names_its_lengths_and_the_way_out():
    check_fits(Prompt((1,) * 90), 10, 100)
    with pytest.raises(RowFailure, match=r"91 tokens.* 10, .*100 .*task\.max_tokens") as caught:
        check_fits(Prompt((1,) * 91), 10, 100)
    assert caught.value.error_type == "too_long"


def test_text_is_cut_at_the_first_stop_string():
    assert cut_at_stop("one two three", ("three", "two")) == "one "
    assert cut_at_stop("one two three", ("four",)) == "one two three"
    assert cut_at_stop("one", ()) == "one"
