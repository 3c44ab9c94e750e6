"""The living state of one request while it is continued, token by token."""

import torch
from numpy import bool_
from numpy.typing import NDArray

from granite_ray.engine.grammar import GrammarMatcher
from granite_ray.engine.requests import GenerateRequest, cut_at_stop, fail, settle
from granite_ray.errors import RowFailure
from granite_ray.records import Completion, FinishReason
from granite_ray.tokenizer import Tokenizer


class Continuation:
    """A completion in the making: it knows where it must end and tells its caller."""

    def __init__(
        self, request: GenerateRequest, tokenizer: Tokenizer, matcher: GrammarMatcher | None
    ) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.generator = torch.Generator().manual_seed(request.sampling.seed)
        self._tokenizer = tokenizer
        self._matcher = matcher
        # A stop string would cut JSON open; under a grammar the grammar says where to stop.
        self._stop = request.sampling.stop if matcher is None else ()
        self._max_stop_bytes = max((len(stop.encode()) for stop in self._stop), default=0)

    @property
    def is_finished(self) -> bool:
        """Whether the caller has its completion or a failure, or stopped waiting."""
        return self.request.future.done()

    def allowed_tokens(self) -> NDArray[bool_] | None:
        """Return which tokens the grammar allows next; None where anything goes."""
        if self._matcher is None or self.is_finished:
            return None
        try:
            return self._matcher.allowed_tokens()
        except RowFailure as failure:
            fail(self.request.future, failure)
            return None

    def append(self, token_id: int) -> None:
        """Take the next token, and finish where it is the last."""
        if self.is_finished:
            return
        if token_id in self._tokenizer.eos_token_ids:
            self._finish("stop")
            return
        self.token_ids.append(token_id)
        try:
            is_last = self._step_grammar(token_id) or self._ends_with_stop_string()
        except RowFailure as failure:
            fail(self.request.future, failure)
            return
        if is_last:
            self._finish("stop")
        elif len(self.token_ids) == self.request.sampling.max_tokens:
            self._finish("length")

    def _step_grammar(self, token_id: int) -> bool:
        if self._matcher is None:
            return False
        self._matcher.consume(token_id)
        return self._matcher.is_finished

    def _ends_with_stop_string(self) -> bool:
        if not self._stop:
            return False
        # Every token brings a byte at least, so a stop string that ends now began in these.
        tail = self._tokenizer.decode(self.token_ids[-self._max_stop_bytes :])
        return any(stop in tail for stop in self._stop)

    def _finish(self, reason: FinishReason) -> None:
        text = self._tokenizer.decode(self.token_ids)
        completion = Completion(
            text=cut_at_stop(text, self._stop),
            num_prompt_tokens=len(self.request.prompt.token_ids),
            num_completion_tokens=len(self.token_ids),
            finish_reason=reason,
        )
        settle(self.request.future, completion)
