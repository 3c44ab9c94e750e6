"""transformers' `generate`: batches of requests sorted by length, padded on the left.

A batch goes on until its longest completion is done; the others are cut to what was wanted.
"""

import torch
from engines.exchange import Answer, Measure, Request, read_assignment, time_measures
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils.logging import disable_progress_bar


def main() -> None:
    disable_progress_bar()
    assignment = read_assignment()
    torch.set_num_threads(assignment.num_threads)
    model = AutoModelForCausalLM.from_pretrained(assignment.checkpoint_path, dtype=torch.bfloat16)
    model.eval()

    def run(measure: Measure) -> Answer:
        requests = measure.requests
        order = sorted(range(len(requests)), key=lambda index: len(requests[index].token_ids))
        answers: list[list[int]] = [[] for _ in requests]
        num_steps = 0
        for start in range(0, len(order), measure.batch_size):
            indices = order[start : start + measure.batch_size]
            batch = [requests[index] for index in indices]
            for index, token_ids in zip(indices, generate(model, batch), strict=True):
                answers[index] = token_ids
            num_steps += max(request.num_completion_tokens for request in batch)
        return Answer(answers, num_steps, num_cached_tokens=0)

    time_measures(run, assignment)


@torch.inference_mode()
def generate(model: torch.nn.Module, requests: list[Request]) -> list[list[int]]:
    longest = max(len(request.token_ids) for request in requests)
    num_new_tokens = max(request.num_completion_tokens for request in requests)
    input_ids = torch.zeros(len(requests), longest, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, request in enumerate(requests):
        input_ids[row, -len(request.token_ids) :] = torch.tensor(request.token_ids)
        attention_mask[row, -len(request.token_ids) :] = 1
    greedy = GenerationConfig(do_sample=False, max_new_tokens=num_new_tokens, pad_token_id=0)
    out = model.generate(
        input_ids=input_ids, attention_mask=attention_mask, generation_config=greedy
    )
    return [
        row[longest : longest + request.num_completion_tokens].tolist()
        for row, request in zip(out, requests, strict=True)
    ]


if __name__ == "__main__":
    main()
