"""Faults on purpose: engines that die, storages that kill, drivers that can be killed.

What is called here leaves a trace in plain files, so that a test counts model calls and deaths
without asking the code that it tests.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray

from granite_ray.checkpoint import Checkpoint
from granite_ray.config import EngineConfig, ModelConfig
from granite_ray.engine.factory import Engine, make_engine
from granite_ray.io.storage import Storage, open_storage
from granite_ray.parallel.place import RankPlace
from granite_ray.records import Completion, Grammar, Prompt, SamplingParams
from granite_ray.tokenizer import load_tokenizer

POISON = "poisonous"
"""A document with this word kills the process that answers it."""
DOCUMENT = re.compile(r"Document (\d+)\.")
PATIENCE_S = 90.0
"""Far longer than anything takes; a busy machine is no failure."""


# engines ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class TracedEngines:
    """Makes engines that note in `folder` where they live and what they are asked, and may die."""

    folder: str

    def __call__(
        self,
        checkpoint: Checkpoint,
        model: ModelConfig,
        engine: EngineConfig,
        num_threads: int | None = None,
    ) -> Engine:
        inner = make_engine(checkpoint, model, engine, num_threads)
        node_id = ray.get_runtime_context().get_node_id()
        _append(Path(self.folder) / "replicas", f"{os.getpid()} {node_id}")
        return TracedEngine(inner, load_tokenizer(checkpoint.path).decode, Path(self.folder))

    def replicas(self) -> list[tuple[int, str]]:
        """Process and node of every replica that was ever started, in order."""
        lines = _lines(Path(self.folder) / "replicas")
        return [(int(pid), node_id) for pid, node_id in map(str.split, lines)]

    def asked(self) -> list[int]:
        """The number of the document of every model call."""
        return [int(line) for line in _lines(Path(self.folder) / "calls")]


@dataclass(frozen=True, slots=True)
class TracedRank:
    """Where a rank lives, or lived."""

    process_id: int
    replica_id: str
    rank: int


@dataclass(frozen=True, slots=True)
class TracedRanks:
    """Makes engines that note in `folder` which process is which rank, once they are loaded."""

    folder: str

    def __call__(
        self,
        checkpoint: Checkpoint,
        model: ModelConfig,
        engine: EngineConfig,
        num_threads: int | None = None,
        place: RankPlace | None = None,
    ) -> Engine:
        made = make_engine(checkpoint, model, engine, num_threads, place)
        if place is not None:
            meeting = "{}:{}".format(*place.meeting)
            _append(Path(self.folder) / "ranks", f"{os.getpid()} {meeting} {place.rank}")
        return made

    def ranks(self) -> list[TracedRank]:
        """Every rank that was ever started, in order."""
        lines = map(str.split, _lines(Path(self.folder) / "ranks"))
        return [TracedRank(int(pid), meeting, int(rank)) for pid, meeting, rank in lines]


@dataclass(frozen=True, slots=True)
class ReplacingEngines:
    """Makes engines that put a new input file in an old one's place as they are first asked."""

    new_path: str
    old_path: str

    def __call__(
        self,
        checkpoint: Checkpoint,
        model: ModelConfig,
        engine: EngineConfig,
        num_threads: int | None = None,
    ) -> Engine:
        return _ReplacingEngine(make_engine(checkpoint, model, engine, num_threads), self)


class _ReplacingEngine:
    def __init__(self, inner: Engine, paths: ReplacingEngines) -> None:
        self._paths = paths
        self.count, self.score, self.shutdown = inner.count, inner.score, inner.shutdown
        self._inner = inner
        self.num_calls = 0

    @property
    def num_steps(self) -> int:
        return self._inner.num_steps

    @property
    def num_cached_tokens(self) -> int:
        return self._inner.num_cached_tokens

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, grammar: Grammar | None = None
    ) -> Completion:
        with suppress(FileNotFoundError):  # only the first call finds it
            Path(self._paths.new_path).replace(self._paths.old_path)
        return await self._inner.generate(prompt, sampling, grammar)


class TracedEngine:
    """An engine whose calls are noted, and which a poisonous document kills with its process."""

    def __init__(self, inner: Engine, decode: Callable[[Sequence[int]], str], folder: Path) -> None:
        self._inner = inner
        self._decode = decode
        self._folder = folder
        self.num_calls = 0

    @property
    def num_steps(self) -> int:
        return self._inner.num_steps

    @property
    def num_cached_tokens(self) -> int:
        return self._inner.num_cached_tokens

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, grammar: Grammar | None = None
    ) -> Completion:
        text = self._decode(prompt.token_ids)
        found = DOCUMENT.search(text)
        assert found, text
        _append(self._folder / "calls", found[1])
        if POISON in text:
            os.kill(os.getpid(), signal.SIGKILL)
        return await self._inner.generate(prompt, sampling, grammar)

    async def score(self, prompt: Prompt, choices: Sequence[tuple[int, ...]]) -> list[float]:
        return await self._inner.score(prompt, choices)

    def count(self, text: str) -> int:
        return self._inner.count(text)

    def shutdown(self) -> None:
        self._inner.shutdown()


def _append(path: Path, line: str) -> None:
    """Add a line with one write, which the system keeps whole between processes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def is_gone(process_id: int) -> bool:
    """Whether a process has ended, though its parent may not have taken note of it."""
    try:
        return psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# storages ────────────────────────────────────────────────────────────────────────────────────────


class FaultyStorage:
    """A storage in front of another: `on_call` hears of each call, before and after it."""

    def __init__(self, inner: Storage, on_call: Callable[[str, str, str], None]) -> None:
        self._inner = inner
        self._on_call = on_call

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(self._inner, name)
        return partial(self._call, name, found) if callable(found) else found

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _call(self, name: str, method: Any, *arguments: Any, **options: Any) -> Any:
        path = arguments[0] if arguments else ""
        self._on_call(name, path, "before")
        result = method(*arguments, **options)
        self._on_call(name, path, "after")
        return result


def open_faulty(path: str, on_call: Callable[[str, str, str], None]) -> FaultyStorage:
    return FaultyStorage(open_storage(path), on_call)


@dataclass(slots=True)
class Death:
    """The process that makes a certain call dies; each worker at its own, the job once."""

    call: str
    path: str
    when: str
    nth: int = 1
    only_process: int | None = None
    once: str | None = None
    """A file whose presence says that it has happened."""
    seen: int = 0

    def __call__(self, name: str, path: str, when: str) -> None:
        if (name, when) != (self.call, self.when) or self.path not in path:
            return
        self.seen += 1
        if self.seen == self.nth and self.only_process in (None, os.getpid()) and self._is_first():
            os.kill(os.getpid(), signal.SIGKILL)

    def _is_first(self) -> bool:
        if self.once is None:
            return True
        try:
            Path(self.once).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


@dataclass(slots=True)
class Deaths:
    """Several deaths in one run, of workers alone: the process `spare` lives."""

    deaths: list[Death]
    spare: int

    def __call__(self, name: str, path: str, when: str) -> None:
        if os.getpid() == self.spare:
            return
        for death in self.deaths:
            death(name, path, when)


@dataclass(frozen=True, slots=True)
class Replacement:
    """Puts another file in an input file's place when it is first opened for its rows."""

    path: str
    new_file: str
    old_file: str
    only_outside: int

    def __call__(self, name: str, path: str, when: str) -> None:
        in_worker = os.getpid() != self.only_outside
        if in_worker and (name, when) == ("open", "before") and path.endswith(self.path):
            with suppress(FileNotFoundError):
                Path(self.new_file).replace(self.old_file)


# drivers ─────────────────────────────────────────────────────────────────────────────────────────


class Driver:
    """A run in a process of its own: it can be signalled, and is gone when the test ends."""

    def __init__(self, folder: Path, job: dict[str, Any], ray_address: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.json").write_text(json.dumps(job))
        self._output = (folder / "output").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.driver", str(folder / "job.json")],
            env=os.environ | {"RAY_ADDRESS": ray_address},
            cwd=Path(__file__).parent.parent,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def output(self) -> str:
        """What it has written to the terminal."""
        self._output.flush()
        return Path(self._output.name).read_text()

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Return the exit code, as a shell would: 128 + n after signal n."""
        code = self._process.wait(timeout_s)
        return code if code >= 0 else 128 - code

    def stop(self) -> None:
        if self.is_running:
            self._process.kill()
        self._process.wait()
        self._output.close()


@contextmanager
def driver(folder: Path, job: dict[str, Any], ray_address: str) -> Iterator[Driver]:
    """Start a run of `tests.driver`; kill it if it still runs in the end."""
    started = Driver(folder, job, ray_address)
    try:
        yield started
    finally:
        started.stop()


def wait_until(
    is_so: Callable[[], object], running: Driver | None = None, timeout_s: float = PATIENCE_S
) -> None:
    """Wait for something to become true; fail at once where the driver ends before it does."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert running is None or running.is_running or is_so(), running.output()
        assert time.monotonic() < deadline, running.output() if running else "it never came"
        time.sleep(0.02)


def result_files(sink: Path) -> set[str]:
    """Names of the committed files that can be seen now."""
    folder = sink / "results"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return {name for name in names if not name.startswith(".")}
