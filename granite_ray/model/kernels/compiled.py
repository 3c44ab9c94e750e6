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
    """Load the kernels, compiled now if they have not been; None where that cannot be, and why."""
    if os.environ.get(SWITCH) == "off":
        return None
    if not _has_instructions():
        logger.info("no CPU kernels: they need %s", ", ".join(NEEDED))
        return None
    try:
        return CpuKernels(ctypes.CDLL(str(_find_library())))
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or str(error)  # the compiler's own words say more
        logger.warning("no CPU kernels, decoding is slower: %s", str(told).strip())
        return None


def compile_kernels(folder: Path) -> Path:
    """Compile the kernels into a folder and return the library; any x86 machine can.

    Raises:
        OSError: There is no C compiler, or the folder cannot be written.
        subprocess.SubprocessError: The compiler fails, or takes too long.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise FileNotFoundError("there is no C compiler; install one, such as gcc")
    library = folder / _library_name()
    # Replicas may start at the same time: each compiles for itself, the last one's file stays.
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as made:
        unfinished = Path(made.name)
    units = [str(path) for path in _sources() if path.suffix == ".c"]
    command = [compiler, *OPTIONS, *units, "-o", str(unfinished), "-lm"]
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S
        )
        unfinished.chmod(0o755)
        unfinished.replace(library)
    finally:
        unfinished.unlink(missing_ok=True)
    return library


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


def _find_library() -> Path:
    """Return the library that came with the package or was compiled before, or compile it."""
    cache_folder = _cache_folder()
    for folder in (SOURCE_FOLDER, cache_folder):
        if (library := folder / _library_name()).exists():
            return library
    return compile_kernels(cache_folder)


def _library_name() -> str:
    """Return a name that changes with the sources."""
    digest = hashlib.sha256(repr(OPTIONS).encode())
    for path in _sources():
        digest.update(path.read_bytes())
    return f"kernels-{digest.hexdigest()[:16]}.so"


def _sources() -> list[Path]:
    return sorted(SOURCE_FOLDER.glob("*.[ch]"))


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
