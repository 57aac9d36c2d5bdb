"""Benchmarks and the figures they leave in ``results/``. In an installation this package is ``fastrex.bench``."""

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Settings of the user's shell that would change what is measured.
FOREIGN = ("MALLOC_", "GLIBC_TUNABLES", "TRITON_INTERPRET", "OMP_", "GOMP_", "KMP_")

# A checkout that is not installed has the operators beside this folder.
if find_spec("fastrex_kernels") is None and (ROOT / "kernels" / "fastrex_kernels").is_dir():
    sys.path.append(str(ROOT / "kernels"))
