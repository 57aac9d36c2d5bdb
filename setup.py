"""What pyproject.toml cannot express: packages outside ``fastrex/``, and csrc/, which is built against torch."""

import os
import platform
from pathlib import Path

from setuptools import find_packages, setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:  # without --no-build-isolation: a working, slower package, which says so when it is imported
    torch = None

FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",  # false alarms inside the headers of g++ 12
]
# Without -fopenmp at::parallel_for is serial; it is not given to the linker, so that torch's own runtime is used and a
# process never has two.
OPENMP = ["-fopenmp", "-DAT_PARALLEL_OPENMP=1"]


def extension() -> dict:
    """Arguments of ``setup`` for the C++ operators; none where torch is missing or FASTREX_NO_CPP=1."""
    if torch is None or os.environ.get("FASTREX_NO_CPP") == "1" or platform.system() != "Linux":
        return {}
    version = torch.__version__.split("+")[0]

    class Build(BuildExtension):
        """Names the library after the torch it was built against: the loader takes no other."""

        def get_ext_filename(self, name: str) -> str:
            return f"{name.replace('.', '/')}.torch-{version}.so"

        def run(self) -> None:
            # setuptools' ``optional`` does not cover what torch and ninja raise.
            try:
                super().run()
            except Exception as error:
                if os.environ.get("FASTREX_REQUIRE_CPP") == "1":
                    raise
                print(f"fastrex: the C++ operators were not built, CPU training will be slower: {error}")

    sources = sorted(str(p) for p in Path("csrc").glob("*.cpp"))
    headers = sorted(str(p) for pattern in ("*.h", "*.inl") for p in Path("csrc").glob(pattern))
    library = CppExtension(
        "fastrex_kernels._C",
        sources,
        depends=headers,
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args=[*FLAGS, *OPENMP],
        optional=True,
    )
    return {"ext_modules": [library], "cmdclass": {"build_ext": Build}}


# kernels/ must never become a package of its own: a top-level `kernels` shadows another project's package of that name.
setup(
    packages=[
        *find_packages(include=["fastrex", "fastrex.*"]),
        *find_packages("kernels"),
        "fastrex.bench",
        "fastrex.bench.rivals",
    ],
    package_dir={"fastrex_kernels": "kernels/fastrex_kernels", "fastrex.bench": "benchmarks"},
    package_data={"fastrex": ["recipes/*.toml", "py.typed"], "fastrex_kernels": ["py.typed"]},
    **extension(),
)
