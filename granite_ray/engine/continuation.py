"""The living state of one request while it is continued, token by token. No tensors."""

from array import array
from random import Random

from granite_ray.engine.grammar import GrammarMatcher
from granite_ray.engine.requests import GenerateRequest, cut_at_stop, fail, settle
from granite_ray.errors import RowFailure
from granite_ray.records import Completion, FinishReason, TokenLogprobs
from granite_ray.tokenizer import Tokenizer


class Continuation:
    """A completion in the making: it knows where it must end and tells its caller.

    Attributes:
        token_ids: What was chosen so far.
        logprobs: One for each of `token_ids`, where they are asked for.
        seen_token_ids: Those of the prompt, each once, then `token_ids`; None where repetition is
            not penalized.
        number: At least 0, below 1: where in its distribution the next token is drawn. It follows
            from the seed and the token's position alone, so a text does not depend on neighbours,
            on forced tokens taken at once, or on a step that is done twice.
        num_cached_tokens: Of the prompt, how many were not computed again; the engine says so.
    """

    def __init__(
        self, request: GenerateRequest, tokenizer: Tokenizer, matcher: GrammarMatcher | None
    ) -> None:
        sampling = request.sampling
        has_penalty = sampling.repetition_penalty != 1
        self.request = request
        self.matcher = matcher
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.seen_token_ids = array("q", set(request.prompt.token_ids)) if has_penalty else None
        self.num_cached_tokens = 0
        self.is_greedy = not (sampling.temperature or has_penalty)
        """Whether the next token is the likeliest of those that the grammar allows."""
        self._numbers = Random(sampling.seed)
        self.number = self._numbers.random()
        self._tokenizer = tokenizer
        # What ends a text would cut JSON open: under a grammar the grammar says where to stop.
        self._stop = sampling.stop if matcher is None else ()
        self._max_stop_bytes = max((len(stop.encode()) for stop in self._stop), default=0)
        stop_token_ids = sampling.stop_token_ids if matcher is None else ()
        self._end_token_ids = frozenset([*tokenizer.eos_token_ids, *stop_token_ids])

    @property
    def is_finished(self) -> bool:
        """Whether the caller has its completion or a failure, or stopped waiting."""
        return self.request.future.done()

    def append(self, token_id: int, logprobs: TokenLogprobs | None = None) -> None:
        """Take the next token, and finish where it is the last."""
        if self.is_finished:
            return
        if token_id in self._end_token_ids:
            self._finish("stop")
            return
        self._keep(token_id, logprobs)
        try:
            is_last = self._step_grammar(token_id) or self._ends_with_stop_string()
        except RowFailure as failure:
            fail(self.request.future, failure)
            return
        if is_last:
            self._finish("stop")
        elif len(self.token_ids) == self.request.sampling.max_tokens:
            self._finish("length")

    def take_forced_tokens(self) -> list[int]:
        """Take the tokens that the grammar forces next, and return them.

        They are the ones that masks would leave, one by one, so an engine may ask or not: before
        the first token and after each `append`. Where log-probabilities are asked for, none is
        taken: every token then needs its own logits.
        """
        wants_logprobs = self.request.sampling.num_logprobs is not None
        if self.matcher is None or wants_logprobs or self.is_finished:
            return []
        try:
            forced = self.matcher.forced_tokens()
        except RowFailure as failure:
            fail(self.request.future, failure)
            return []
        num_before = len(self.token_ids)
        for token_id in forced:
            self.append(token_id)  # takes nothing more once finished
        return self.token_ids[num_before:]

    def check_grammar(self) -> None:
        """Fail the request where its grammar broke while a mask was computed."""
        if self.matcher is None:
            return
        try:
            self.matcher.raise_if_broken()
        except RowFailure as failure:
            fail(self.request.future, failure)

    def _keep(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        self.token_ids.append(token_id)
        if self.request.on_token is not None:
            self.request.on_token(token_id, logprobs)
        self.number = self._numbers.random()
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if self.seen_token_ids is not None:
            self.seen_token_ids.append(token_id)

    def _step_grammar(self, token_id: int) -> bool:
        if self.matcher is None:
            return False
        self.matcher.consume(token_id)
        return self.matcher.is_finished

    def _ends_with_stop_string(self) -> bool:
        if not self._stop:
            return False
        # Every token of text brings a byte at least, so a stop string that ends now began in these.
        tail = self._tokenizer.decode(self.token_ids[-self._max_stop_bytes :])
        return any(stop in tail for stop in self._stop)

    def _finish(self, reason: FinishReason) -> None:
        text = self._tokenizer.decode(self.token_ids)
        wants_logprobs = self.request.sampling.num_logprobs is not None
        completion = Completion(
            text=cut_at_stop(text, self._stop),
            num_prompt_tokens=len(self.request.prompt.token_ids),
            num_completion_tokens=len(self.token_ids),
            finish_reason=reason,
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs) if wants_logprobs else None,
            num_cached_tokens=self.num_cached_tokens,
        )
        settle(self.request.future, completion)
