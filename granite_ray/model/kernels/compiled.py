"""The C sources → a library, once for each user and machine."""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from granite_ray.model.kernels.calls import CpuKernels

SWITCH = "GRANITE_RAY_CPU_KERNELS"
SOURCE_FOLDER = Path(__file__).parent
CPU_FLAGS_PATH = Path("/proc/cpuinfo")
NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
OPTIONS = (
    *("-O3", "-std=gnu11", "-shared", "-fPIC", "-fopenmp"),
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma"),
)
COMPILE_TIMEOUT_S = 120
MAX_TOKENS = 32
"""More tokens than that are multiplied faster by torch."""
ROWS_A_TASK = 64
"""As in vectors.h."""

logger = logging.getLogger(__name__)


@cache
def load_kernels() -> CpuKernels | None:
    """Compile the kernels or take what was compiled before; None where that cannot be, and why."""
    if os.environ.get(SWITCH) == "off":
        return None
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if not _has_instructions():
        logger.info("no CPU kernels: they need %s", ", ".join(NEEDED))
    elif compiler is None:
        logger.warning("no CPU kernels, decoding is slower: install a C compiler, such as gcc")
    else:
        try:
            return CpuKernels(ctypes.CDLL(str(_compiled(compiler))))
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("no CPU kernels, decoding is slower: %s", _reason(error))
    return None


def kernels_for(tensor: torch.Tensor, *sizes: tuple[int, int]) -> CpuKernels | None:
    """Return the kernels if they can work on tensors of this kind, of these sizes.

    Args:
        tensor: A weight or a cache: its dtype and device count.
        sizes: Pairs of a size and what must divide it.
    """
    fits = all(size % divisor == 0 for size, divisor in sizes)
    is_ours = tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"
    return load_kernels() if fits and is_ours else None


def _has_instructions() -> bool:
    try:
        lines = CPU_FLAGS_PATH.read_text().splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return set(NEEDED) <= set(flags)


def _compiled(compiler: str) -> Path:
    """Return the library, compiled now if this source has not been before."""
    sources = sorted(SOURCE_FOLDER.glob("*.[ch]"))
    digest = hashlib.sha256(repr((compiler, OPTIONS)).encode())
    for path in sources:
        digest.update(path.read_bytes())
    library = _cache_folder() / f"kernels-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        # Replicas may start at the same time: each compiles for itself, the last one's file stays.
        with tempfile.NamedTemporaryFile(dir=library.parent, suffix=".so", delete=False) as made:
            unfinished = Path(made.name)
        units = [str(path) for path in sources if path.suffix == ".c"]
        command = [compiler, *OPTIONS, *units, "-o", str(unfinished), "-lm"]
        try:
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S
            )
            unfinished.replace(library)
        finally:
            unfinished.unlink(missing_ok=True)
    return library


def _cache_folder() -> Path:
    """Return the user's own cache folder, or a fresh one: no one else may put a library there."""
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(home) if home else Path.home() / ".cache") / "granite_ray"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # no home, or none that can be written
        pass
    return Path(tempfile.mkdtemp(prefix="granite_ray-"))


def _reason(error: Exception) -> str:
    told = getattr(error, "stderr", None) or str(error)
    return str(told).strip().splitlines()[-1]
