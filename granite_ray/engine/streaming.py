"""Token ids, one by one → pieces of text that can be shown at once and never be taken back.

The pieces joined are the completion's text. Plain Python, for whoever listens to `on_token`.
"""

from collections.abc import Sequence

from granite_ray.tokenizer import Tokenizer

BROKEN = "\ufffd"
"""What bytes become that are no UTF-8, or not yet: a character may take several tokens."""


class TextStream:
    """The text of one completion as it grows.

    Args:
        tokenizer: The checkpoint's.
        stop: Stop strings: what may be the beginning of one is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._undecoded: list[int] = []
        self._held = ""
        self._num_shown = 0
        self._is_cut = False

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is certain now, perhaps none."""
        self._undecoded.append(token_id)
        text = self._tokenizer.decode(self._undecoded)
        if self._is_cut or text.endswith(BROKEN):
            return ""
        self._undecoded.clear()
        self._held += text
        found = [place for place in map(self._held.find, self._stop) if place >= 0]
        if found:
            self._is_cut = True
            return self._show(min(found))
        return self._show(len(self._held) - self._num_held_back())

    def finish(self, text: str) -> str:
        """Return what of the completion's whole text has not been shown."""
        return text[self._num_shown :]

    def _show(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        self._num_shown += len(shown)
        return shown

    def _num_held_back(self) -> int:
        """Return the length of the longest end that a stop string could begin with."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
