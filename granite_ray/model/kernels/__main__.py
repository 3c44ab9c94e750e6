"""Compile the kernels into the package: `python -m granite_ray.model.kernels`, for images.

An image that is built so needs no compiler when it runs.
"""

import sys

from granite_ray.model.kernels.compiled import SOURCE_FOLDER, compile_kernels

if __name__ == "__main__":
    sys.stdout.write(f"{compile_kernels(SOURCE_FOLDER)}\n")
