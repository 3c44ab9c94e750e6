"""Prompts → completions: one prefill together, then a token a step for whoever is still running."""

from typing import Any

import torch

from granite_ray.engine.continuation import Continuation
from granite_ray.engine.grammar import GrammarCompiler
from granite_ray.engine.reference.token_rows import TokenRows
from granite_ray.engine.sampling import choose_tokens, compute_masks, read_logprobs


@torch.inference_mode()
def finish_sequences(model: Any, grammars: GrammarCompiler, sequences: list[Continuation]) -> None:
    """Continue all sequences to their ends; each tells its caller as soon as it is there."""
    running = sequences
    rows = TokenRows(model, [sequence.request.prompt.token_ids for sequence in running])
    while True:
        token_ids = choose_tokens(rows.next_logits, running, compute_masks(running, grammars))
        logprobs = read_logprobs(rows.next_logits, token_ids, running)
        for sequence, token_id, logprob in zip(running, token_ids, logprobs, strict=True):
            sequence.append(token_id, logprob)
        alive = [row for row, sequence in enumerate(running) if not sequence.is_finished]
        if not alive:
            return
        if len(alive) < len(running):  # finished rows cost nothing from here on
            rows.keep(alive)
            running = [running[row] for row in alive]
            token_ids = [token_ids[row] for row in alive]
        rows.append(token_ids)
