"""Package layout that pyproject.toml cannot express: two import packages live outside ``fastrex/``."""

from setuptools import find_packages, setup

# kernels/ must never become a package of its own: a top-level `kernels` shadows another project's package of that name.
setup(
    packages=[
        *find_packages(include=["fastrex", "fastrex.*"]),
        *find_packages("kernels"),
        "fastrex.bench",
    ],
    package_dir={"fastrex_kernels": "kernels/fastrex_kernels", "fastrex.bench": "benchmarks"},
    package_data={"fastrex": ["recipes/*.toml", "py.typed"], "fastrex_kernels": ["py.typed"]},
)
