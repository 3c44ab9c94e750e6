"""Our engine as a job runs it: defaults of the config, requests in flight together."""

import asyncio

from engines.exchange import Answer, Measure, read_assignment, time_measures

from granite_ray.checkpoint import open_checkpoint
from granite_ray.config import EngineConfig, ModelConfig
from granite_ray.engine.factory import Engine, make_engine
from granite_ray.records import Completion, Prompt, SamplingParams


def main() -> None:
    assignment = read_assignment()
    model = ModelConfig(path=assignment.checkpoint_path, max_model_len=assignment.max_model_len)
    checkpoint = open_checkpoint(model)
    config = EngineConfig(backend="native", device="cpu")
    engine = make_engine(checkpoint, model, config, assignment.num_threads)

    def run(measure: Measure) -> Answer:
        num_layers_before = engine.num_steps  # it counts layers
        completions = asyncio.run(complete(engine, measure))
        num_layers = engine.num_steps - num_layers_before
        return Answer(
            [list(completion.token_ids) for completion in completions],
            num_steps=num_layers // checkpoint.config["num_hidden_layers"],
            num_cached_tokens=sum(completion.num_cached_tokens for completion in completions),
        )

    time_measures(run, assignment)
    engine.shutdown()


async def complete(engine: Engine, measure: Measure) -> list[Completion]:
    junctions = (measure.num_shared_tokens,) if measure.num_shared_tokens else ()
    return await asyncio.gather(
        *(
            engine.generate(
                Prompt(tuple(request.token_ids), junctions),
                SamplingParams(max_tokens=request.num_completion_tokens),
            )
            for request in measure.requests
        )
    )


if __name__ == "__main__":
    main()
