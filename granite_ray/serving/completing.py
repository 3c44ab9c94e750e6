"""Conversations and prompts → completions on one engine. No HTTP, no Ray."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from granite_ray.engine.factory import Engine
from granite_ray.engine.requests import OnToken
from granite_ray.engine.streaming import TextStream
from granite_ray.errors import ConfigError, RowFailure
from granite_ray.records import Completion, Grammar, Prompt, SamplingParams, TokenLogprobs
from granite_ray.serving.calls import (
    Choice,
    ChoiceReason,
    CompletionCall,
    Delta,
    Refusal,
    Reply,
    TokenText,
)
from granite_ray.tasks.base import gather_all
from granite_ray.tasks.chat import chat_prompt, chat_stop
from granite_ray.tasks.generate import read_tool_calls
from granite_ray.tokenizer import Tokenizer

FIM_NAMES = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
OLD_FIM_NAMES = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")

Listener = Callable[[Delta], None]


@dataclass(frozen=True, slots=True)
class _Ask:
    """One prompt as the engine gets it; its choices have the indices from `first_index` on."""

    prompt: Prompt
    sampling: SamplingParams
    grammar: Grammar | None
    first_index: int


class Completer:
    """Asks one engine for the choices of a call."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, max_model_len: int) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len

    async def complete(
        self, call: CompletionCall, *, is_interactive: bool, listen: Listener | None = None
    ) -> Reply | Refusal:
        """Return all choices, or why there is none.

        Raises:
            InfrastructureError: The engine is broken.
        """
        try:
            prompts = self._prompts(call)
            asks = [self._ask(call, prompt, at) for at, prompt in enumerate(prompts)]
            completions = await gather_all(
                [
                    self._complete_one(ask, number, listen, is_interactive=is_interactive)
                    for ask in asks
                    for number in range(call.num_choices)
                ]
            )
        except RowFailure as failure:
            return _refusal(failure)
        except ConfigError as error:
            return Refusal(400, str(error), "invalid_request")
        return Reply(
            choices=tuple(
                self._choice(index, completion, call)
                for index, completion in enumerate(completions)
            ),
            num_prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts),
            num_completion_tokens=sum(one.num_completion_tokens for one in completions),
            num_cached_tokens=sum(
                one.num_cached_tokens for one in completions[:: call.num_choices]
            ),
        )

    async def stream(self, call: CompletionCall) -> AsyncGenerator[Delta | Reply | Refusal]:
        """Yield what is written as it is written, then the reply; closing it cancels the work."""
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[Delta | None] = asyncio.Queue()

        def listen(delta: Delta) -> None:
            with suppress(RuntimeError):  # the loop is gone, and so is who listens
                loop.call_soon_threadsafe(deltas.put_nowait, delta)

        heard = None if _hides_text(call) else listen
        work = asyncio.ensure_future(self.complete(call, is_interactive=True, listen=heard))
        work.add_done_callback(lambda _: deltas.put_nowait(None))
        shown: dict[int, int] = {}
        try:
            while (delta := await deltas.get()) is not None:
                for joined in _join(delta, deltas):
                    shown[joined.index] = shown.get(joined.index, 0) + len(joined.text)
                    yield joined
            reply = await work
            if isinstance(reply, Reply):
                for choice in reply.choices:  # what was held back to the end
                    if rest := choice.text[shown.get(choice.index, 0) :]:
                        yield Delta(choice.index, rest)
            yield reply
        finally:
            work.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await work

    # one completion ──────────────────────────────────────────────────────────────────────────────

    async def _complete_one(
        self, ask: "_Ask", number: int, listen: Listener | None, *, is_interactive: bool
    ) -> Completion:
        return await self._engine.generate(
            ask.prompt,
            _seeded(ask.sampling, number),
            ask.grammar,
            is_interactive=is_interactive,
            on_token=listen and self._on_token(ask, number, listen),
        )

    def _on_token(self, ask: "_Ask", number: int, listen: Listener) -> OnToken:
        text = TextStream(self._tokenizer, () if ask.grammar else ask.sampling.stop)

        def on_token(token_id: int, logprobs: TokenLogprobs | None) -> None:
            piece = text.push(token_id)
            shown = (self._token_text(logprobs),) if logprobs else ()
            if piece or shown:
                listen(Delta(ask.first_index + number, piece, shown))

        return on_token

    def _ask(self, call: CompletionCall, prompt: Prompt, at: int) -> "_Ask":
        free = self._max_model_len - len(prompt.token_ids)
        max_tokens = call.max_tokens or max(1, min(free, call.most_tokens))
        stop = (*call.sampling.stop, *(chat_stop(self._tokenizer) if call.messages else ()))
        sampling = replace(call.sampling, max_tokens=max_tokens, stop=stop)
        schema = _call_schema(call) if _must_call(call) else call.json_schema
        grammar = None if schema is None else Grammar(schema)
        return _Ask(prompt, sampling, grammar, at * call.num_choices)

    def _choice(self, index: int, completion: Completion, call: CompletionCall) -> Choice:
        text, reason = completion.text, completion.finish_reason
        calls: Sequence[dict[str, str]] = ()
        if _must_call(call):
            calls = _read_call(text) if reason == "stop" else ()
        elif call.tools and call.tool_choice != "none":
            calls = read_tool_calls(text)
        logprobs = None
        if completion.logprobs is not None:
            logprobs = tuple(self._token_text(one) for one in completion.logprobs)
        why: ChoiceReason = "tool_calls" if calls else reason
        kept = "" if _must_call(call) else text.partition("<tool_call>")[0] if calls else text
        return Choice(index, kept.strip() if calls else kept, why, tuple(calls), logprobs)

    def _token_text(self, one: TokenLogprobs) -> TokenText:
        top = tuple((self._tokenizer.decode([token_id]), value) for token_id, value in one.top)
        return TokenText(self._tokenizer.decode([one.token_id]), one.logprob, top)

    # prompts ─────────────────────────────────────────────────────────────────────────────────────

    def _prompts(self, call: CompletionCall) -> list[Prompt]:
        if call.messages:
            tools = call.tools if call.tool_choice != "none" else ()
            must_call = _must_call(call)
            return [chat_prompt(call.messages, self._tokenizer, tools=tools, must_call=must_call)]
        return [self._continued(prompt, call.suffix) for prompt in call.prompts]

    def _continued(self, prompt: str | tuple[int, ...], suffix: str | None) -> Prompt:
        if not prompt and suffix is None:
            raise ConfigError("prompt is empty; there is nothing to continue.")
        if not isinstance(prompt, str):
            if any(token_id >= self._tokenizer.vocab_size for token_id in prompt):
                raise ConfigError(
                    f"prompt has token ids beyond the vocabulary of {self._tokenizer.vocab_size:,}."
                )
            return Prompt(prompt)
        if suffix is None:
            return Prompt(tuple(self._tokenizer.encode_text(prompt)))
        before, after, middle = self._fim_token_ids()
        encode = self._tokenizer.encode_text
        return Prompt((before, *encode(prompt), after, *encode(suffix), middle))

    def _fim_token_ids(self) -> tuple[int, int, int]:
        for names in (FIM_NAMES, OLD_FIM_NAMES):
            found = [self._tokenizer.encode_template(name) for name in names]
            if all(len(ids) == 1 and ids[0] in self._tokenizer.control_token_ids for ids in found):
                return found[0][0], found[1][0], found[2][0]
        raise ConfigError("suffix needs a checkpoint with tokens for filling gaps; this has none.")


def _hides_text(call: CompletionCall) -> bool:
    """Calls of tools are told whole: half of one is of no use."""
    return bool(call.tools) and call.tool_choice != "none"


def _must_call(call: CompletionCall) -> bool:
    return bool(call.tools) and call.tool_choice not in ("auto", "none")


def _call_schema(call: CompletionCall) -> str:
    """Return the schema of a call of one of the tools, or of the one that is named."""
    functions = [tool["function"] for tool in call.tools]
    if call.tool_choice != "required":
        functions = [one for one in functions if one["name"] == call.tool_choice]
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": function.get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    return json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls})


def _read_call(text: str) -> list[dict[str, str]]:
    call: dict[str, Any] = json.loads(text)
    return [{"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}]


def _seeded(sampling: SamplingParams, number: int) -> SamplingParams:
    """Choices of one call differ in their seeds alone."""
    return replace(sampling, seed=sampling.seed + number) if number else sampling


def _join(first: Delta, deltas: "asyncio.Queue[Delta | None]") -> list[Delta]:
    """Join what has come meanwhile, by choice: a slow way to the caller sends fewer messages."""
    joined = {first.index: first}
    while not deltas.empty():
        delta = deltas.get_nowait()
        if delta is None:
            deltas.put_nowait(None)  # the end, for the caller
            break
        before = joined.get(delta.index, Delta(delta.index, ""))
        joined[delta.index] = Delta(
            delta.index, before.text + delta.text, (*before.logprobs, *delta.logprobs)
        )
    return list(joined.values())


def _refusal(failure: RowFailure) -> Refusal:
    if failure.error_type == "too_long":
        return Refusal(400, _in_api_words(failure.message), "context_length_exceeded")
    return Refusal(500, _in_api_words(failure.message), failure.error_type)


def _in_api_words(message: str) -> str:
    return message.replace(
        "lower chunking.max_tokens or task.max_tokens", "shorten it or lower max_tokens"
    )
