import asyncio

import pytest

from granite_ray.config import GenerateConfig
from granite_ray.errors import ConfigError, InfrastructureError, RowFailure
from granite_ray.records import Completion, Prompt, SamplingParams
from granite_ray.tasks.base import (
    MeteredLLM,
    TaskLimits,
    chunk_tokens,
    free_tokens,
    gather_all,
    gather_chunks,
    run_metered,
    sampling_params,
)
from granite_ray.tokenizer import Tokenizer
from tests.unit.tasks.scripted import ScriptedLLM, make_document


class Log:
    """Calls that end well, fail, or wait for ever, and what became of them."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []

    async def end(self, answer: str) -> str:
        await asyncio.sleep(0)
        return answer

    async def fail(self, error: BaseException) -> str:
        await asyncio.sleep(0)
        raise error

    async def hang(self, name: str) -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # cleaning up takes a moment
            self.cancelled.append(name)
            raise
        raise AssertionError


def too_long() -> RowFailure:
    return RowFailure("too_long", "too long")


@pytest.fixture
def llm(tokenizer: Tokenizer) -> MeteredLLM:
    return MeteredLLM(ScriptedLLM(tokenizer))


def test_answers_come_in_the_order_of_the_chunks(llm: MeteredLLM) -> None:
    async def late(answer: str, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return answer

    calls = [late("a", 0.03), late("b", 0.0), late("c", 0.01)]
    assert asyncio.run(gather_chunks(calls, llm, 0)) == ["a", "b", "c"]


def test_one_failure_cancels_the_siblings_and_is_raised_itself(llm: MeteredLLM) -> None:
    log, failure = Log(), too_long()
    with pytest.raises(RowFailure) as caught:
        asyncio.run(gather_chunks([log.hang("a"), log.fail(failure), log.hang("c")], llm, 0))
    assert caught.value is failure
    assert log.cancelled == ["a", "c"]
    assert llm.num_failed_chunks == 1


def test_as_many_failures_as_allowed_leave_gaps(llm: MeteredLLM) -> None:
    log = Log()
    calls = [log.fail(too_long()), log.end("b"), log.fail(too_long())]
    assert asyncio.run(gather_chunks(calls, llm, 2)) == [None, "b", None]
    assert llm.num_failed_chunks == 2


def test_failures_of_earlier_rounds_count(llm: MeteredLLM) -> None:
    log = Log()
    asyncio.run(gather_chunks([log.fail(too_long()), log.end("b")], llm, 1))
    with pytest.raises(RowFailure):
        asyncio.run(gather_chunks([log.fail(too_long()), log.end("b")], llm, 1))


def test_a_document_that_lost_all_its_chunks_fails(llm: MeteredLLM) -> None:
    with pytest.raises(RowFailure):
        asyncio.run(gather_chunks([Log().fail(too_long())], llm, 5))


def test_a_broken_machine_is_raised_at_once_with_nothing_left_running(llm: MeteredLLM) -> None:
    log = Log()
    calls = [log.hang("a"), log.fail(OSError("gone")), log.hang("c")]
    with pytest.raises(OSError, match="gone"):
        asyncio.run(gather_chunks(calls, llm, 9))
    assert log.cancelled == ["a", "c"]


def test_a_call_that_the_engine_cancels_does_not_look_like_our_own_cancellation() -> None:
    log = Log()
    with pytest.raises(InfrastructureError, match="dropped"):
        asyncio.run(gather_all([log.fail(asyncio.CancelledError()), log.hang("b")]))
    assert log.cancelled == ["b"]


def test_cancelling_the_document_cancels_its_calls() -> None:
    log = Log()

    async def cancel_from_outside() -> None:
        waiting = asyncio.ensure_future(gather_all([log.hang("a"), log.hang("b")]))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(cancel_from_outside())
    assert log.cancelled == ["a", "b"]


def test_a_document_pays_for_all_its_calls_and_is_cut_if_one_answer_was(
    tokenizer: Tokenizer,
) -> None:
    llm = ScriptedLLM(
        tokenizer,
        lambda call: Completion("x", 3, 1, "length" if call.text == "1" else "stop"),
    )
    document = make_document(tokenizer, "a", "b")
    digits = [Prompt(tuple(tokenizer.encode_text(str(digit)))) for digit in range(3)]

    async def answer(_: object, metered: MeteredLLM) -> dict[str, str]:
        for prompt in digits:
            await metered.generate(prompt, SamplingParams(1))
        await metered.score(digits[0], [(1,)])
        return {"text": "done"}

    result = asyncio.run(run_metered(document, llm, answer))
    assert result.values == {"text": "done"}
    assert (result.num_prompt_tokens, result.num_completion_tokens) == (3 * 3 + 1, 3)
    assert (result.num_chunks, result.finish_reason, result.error) == (2, "length", None)


def test_a_failed_document_has_its_counts_too(tokenizer: Tokenizer) -> None:
    async def answer(_: object, metered: MeteredLLM) -> dict[str, str]:
        await metered.generate(Prompt((1, 2)), SamplingParams(1))
        raise too_long()

    document = make_document(tokenizer, "a")
    result = asyncio.run(run_metered(document, ScriptedLLM(tokenizer), answer))
    assert result.error is not None
    assert result.error.error_type == "too_long"
    assert result.num_prompt_tokens == 2


def test_seeds_belong_to_seed_document_purpose_and_chunk(tokenizer: Tokenizer) -> None:
    document = make_document(tokenizer, "a")

    def seed(base: int = 0, purpose: str = "text", index: int = 0) -> int:
        config = GenerateConfig(kind="generate", template="{{ text }}", seed=base)
        return sampling_params(config, document, purpose, index).seed

    seeds = [seed(), seed(base=1), seed(purpose="points"), seed(index=1)]
    assert len(set(seeds)) == 4
    assert seeds[0] == seed()
    assert all(0 <= one < 2**63 for one in seeds)


def test_a_prompt_without_room_for_a_document_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.max_model_len is 100.*task\.max_tokens"):
        free_tokens(TaskLimits(100), 50, 35)
    assert free_tokens(TaskLimits(100), 50, 34) == 16


def test_chunking_max_tokens_makes_chunks_shorter_but_never_longer() -> None:
    assert chunk_tokens(TaskLimits(100, max_chunk_tokens=10), 40) == 10
    assert chunk_tokens(TaskLimits(100, max_chunk_tokens=90), 40) == 40
    assert chunk_tokens(TaskLimits(100), 40) == 40
