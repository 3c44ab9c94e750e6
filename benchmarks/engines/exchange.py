"""What `engine.py` and the programs beside this file tell each other, as JSON in one folder.

A program is started in a fresh process, by an interpreter of its own if need be: nothing but the
standard library is imported here.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, and how many tokens are wanted after it: greedy, and no fewer.

    With `labels` the likeliest of them is wanted, with `json_schema` JSON that is valid for it:
    both end by themselves, after `num_completion_tokens` at the most.
    """

    token_ids: list[int]
    num_completion_tokens: int
    labels: list[str] = field(default_factory=list)
    json_schema: str | None = None

    @property
    def has_fixed_length(self) -> bool:
        return not self.labels and self.json_schema is None


@dataclass(frozen=True, slots=True)
class Measure:
    """Requests that are handed over together, and timed until the last is answered.

    All prompts begin with the same `num_shared_tokens`. Only engines that pad heed `batch_size`.
    """

    name: str
    requests: list[Request]
    num_shared_tokens: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Token ids for each request, and how the engine came by them, where it tells."""

    token_ids: list[list[int]]
    num_steps: int | None = None
    num_cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Timed:
    """An answer, and the seconds that it took."""

    seconds: float
    answer: Answer


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a program is to do, and whether CPU seconds count instead of those on the clock."""

    checkpoint_path: str
    num_threads: int
    is_cpu_time: bool
    max_model_len: int
    measures: list[Measure]


def write_assignment(folder: Path, assignment: Assignment) -> None:
    (folder / "assignment.json").write_text(json.dumps(asdict(assignment)))


def read_assignment() -> Assignment:
    """Read what the folder named on the command line asks for."""
    found = json.loads((_folder() / "assignment.json").read_text())
    measures = [
        Measure(**{**measure, "requests": [Request(**request) for request in measure["requests"]]})
        for measure in found["measures"]
    ]
    return Assignment(**{**found, "measures": measures})


def write_result(result: Any) -> None:
    (_folder() / "result.json").write_text(json.dumps(result))


def read_result(folder: Path) -> Any:
    return json.loads((folder / "result.json").read_text())


def choose_clock(assignment: Assignment) -> Callable[[], float]:
    return time.process_time if assignment.is_cpu_time else time.perf_counter


def time_measures(run: Callable[[Measure], Answer], assignment: Assignment) -> None:
    """Time each measure after a first, untimed one, and hand over what came out.

    A completion of another length than wanted would falsify every figure: it ends the program.
    """
    clock = choose_clock(assignment)
    run(assignment.measures[0])
    result = {}
    for measure in assignment.measures[1:]:
        started = clock()
        answer = run(measure)
        result[measure.name] = {
            "seconds": clock() - started,
            "answer": asdict(answer),
        }
        for request, token_ids in zip(measure.requests, answer.token_ids, strict=True):
            wanted, got = request.num_completion_tokens, len(token_ids)
            if got > wanted or (request.has_fixed_length and got < wanted):
                raise SystemExit(f"{measure.name}: {got} completion tokens instead of {wanted}")
    write_result(result)


def read_timed(folder: Path) -> dict[str, Timed]:
    """Read what `time_measures` wrote, by name of the measure."""
    return {
        name: Timed(timed["seconds"], Answer(**timed["answer"]))
        for name, timed in read_result(folder).items()
    }


def _folder() -> Path:
    return Path(sys.argv[1])
