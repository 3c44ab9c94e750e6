"""Our engine as a job runs it: defaults of the config, requests in flight together."""

import asyncio

from engines.exchange import Answer, Measure, Request, read_assignment, time_measures

from granite_ray.checkpoint import open_checkpoint
from granite_ray.config import EngineConfig, ModelConfig
from granite_ray.engine.factory import Engine, make_engine
from granite_ray.records import Grammar, Prompt, SamplingParams
from granite_ray.tokenizer import Tokenizer, load_tokenizer


def main() -> None:
    assignment = read_assignment()
    model = ModelConfig(path=assignment.checkpoint_path, max_model_len=assignment.max_model_len)
    checkpoint = open_checkpoint(model)
    tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    config = EngineConfig(backend="native", device="cpu")
    engine = make_engine(checkpoint, model, config, assignment.num_threads)

    def run(measure: Measure) -> Answer:
        num_layers, num_cached_tokens = engine.num_steps, engine.num_cached_tokens
        answers = asyncio.run(answer_all(engine, tokenizer, measure))
        num_layers = engine.num_steps - num_layers
        return Answer(
            answers,
            num_steps=num_layers // checkpoint.config["num_hidden_layers"],
            num_cached_tokens=engine.num_cached_tokens - num_cached_tokens,
        )

    time_measures(run, assignment)
    engine.shutdown()


async def answer_all(engine: Engine, tokenizer: Tokenizer, measure: Measure) -> list[list[int]]:
    junctions = (measure.num_shared_tokens,) if measure.num_shared_tokens else ()
    return await asyncio.gather(
        *(
            answer(engine, tokenizer, request, Prompt(tuple(request.token_ids), junctions))
            for request in measure.requests
        )
    )


async def answer(
    engine: Engine, tokenizer: Tokenizer, request: Request, prompt: Prompt
) -> list[int]:
    if request.labels:
        end = tokenizer.eos_token_ids[0]
        choices = [(*tokenizer.encode_text(label), end) for label in request.labels]
        scores = await engine.score(prompt, choices)
        return list(choices[scores.index(max(scores))][:-1])
    grammar = None if request.json_schema is None else Grammar(request.json_schema)
    sampling = SamplingParams(max_tokens=request.num_completion_tokens)
    return list((await engine.generate(prompt, sampling, grammar)).token_ids)


if __name__ == "__main__":
    main()
