"""vLLM on a CPU, with prefix caching; runs in an environment that has it and not our package."""

import os

from engines.exchange import Answer, Measure, Request, read_assignment, time_measures

GIB_FOR_KEYS_AND_VALUES = 4
END_TOKEN_ID = 0


def without_end(token_ids: list[int]) -> list[int]:
    return token_ids[:-1] if token_ids[-1:] == [END_TOKEN_ID] else token_ids


def main() -> None:
    assignment = read_assignment()
    cores = f"0-{assignment.num_threads - 1}"
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_CPU_KVCACHE_SPACE": str(GIB_FOR_KEYS_AND_VALUES),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    from vllm import LLM, SamplingParams  # reads the environment when imported
    from vllm.sampling_params import StructuredOutputsParams

    requests = [request for measure in assignment.measures for request in measure.requests]
    llm = LLM(
        assignment.checkpoint_path,
        # Without a tokenizer it is a little faster, but cannot hold answers to a form.
        skip_tokenizer_init=all(request.has_fixed_length for request in requests),
        dtype="bfloat16",
        enforce_eager=True,
        enable_prefix_caching=True,
        max_model_len=assignment.max_model_len,
        seed=0,
    )

    def form(request: Request) -> StructuredOutputsParams | None:
        if request.labels:
            return StructuredOutputsParams(choice=request.labels)
        if request.json_schema is not None:
            return StructuredOutputsParams(json=request.json_schema, disable_any_whitespace=True)
        return None

    def run(measure: Measure) -> Answer:
        prompts = [{"prompt_token_ids": request.token_ids} for request in measure.requests]
        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=request.num_completion_tokens,
                ignore_eos=request.has_fixed_length,
                detokenize=False,
                structured_outputs=form(request),
            )
            for request in measure.requests
        ]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return Answer(
            [without_end(list(output.outputs[0].token_ids)) for output in outputs],
            num_cached_tokens=sum(output.num_cached_tokens or 0 for output in outputs),
        )

    time_measures(run, assignment)


if __name__ == "__main__":
    main()
