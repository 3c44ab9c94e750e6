"""Logits → one token id a sequence, seeded per sequence."""

import torch

from granite_ray.engine.continuation import Continuation


def choose_tokens(logits: torch.Tensor, sequences: list[Continuation]) -> list[int]:
    """Choose the next token of every sequence from its row of `logits`, which is overwritten."""
    for row, sequence in enumerate(sequences):
        allowed = sequence.allowed_tokens()
        if allowed is not None:
            is_refused = torch.from_numpy(~allowed).to(logits.device)
            logits[row].masked_fill_(is_refused, -torch.inf)
    greedy: list[int] = logits.argmax(dim=-1).tolist()
    return [
        _draw(logits[row], sequence) if sequence.request.sampling.temperature else greedy[row]
        for row, sequence in enumerate(sequences)
    ]


def _draw(logits: torch.Tensor, sequence: Continuation) -> int:
    """Sample on the CPU: each sequence has its own numbers, the same ones on any device."""
    logits = logits.cpu()
    scaled = (logits - logits.max()) / sequence.request.sampling.temperature
    return int(torch.multinomial(scaled.softmax(dim=-1), 1, generator=sequence.generator))
