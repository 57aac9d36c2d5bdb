"""``python aot_compile.py MODULE ARCH...``: compile a kernel module's ``AOT`` list and print one JSON line each.

A process of its own: under ``TRITON_INTERPRET=1`` a kernel cannot be compiled.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """What anyone writes to standard output meanwhile, C code included: Triton prints the report of ptxas there."""
    lines: list[str] = []
    sys.stdout.flush()
    saved = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield lines
        finally:
            sys.stdout.flush()
            os.dup2(saved, 1)
            os.close(saved)
            file.seek(0)
            lines.extend(file.read().decode(errors="replace").splitlines())


def compile_one(item: Any, arch: int) -> dict[str, Any]:
    signature = {**item.signature, **dict.fromkeys(item.constants, "constexpr")}
    ordered = {name: signature[name] for name in item.kernel.arg_names}
    # As for real tensors, which torch allocates aligned: unaligned pointers would compile to other code.
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(ordered.values()) if kind.startswith("*")}
    source = ASTSource(fn=item.kernel, signature=ordered, constexprs=dict(item.constants), attrs=aligned)
    options = {"num_warps": item.num_warps, "num_stages": item.num_stages}
    with captured() as lines:
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    log = "\n".join(lines)
    return {
        "name": item.name,
        "arch": arch,
        "registers": max((int(n) for n in re.findall(r"Used (\d+) registers", log)), default=-1),
        "spill_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)),
        "stack_bytes": max((int(n) for n in re.findall(r"(\d+) bytes stack frame", log)), default=-1),
        "shared_bytes": kernel.metadata.shared,
        "budget": [item.max_registers, item.max_spill_bytes, item.max_shared_bytes],
    }


if __name__ == "__main__":
    os.environ.update(TRITON_DUMP_PTXAS_LOG="1", TRITON_ALWAYS_COMPILE="1")
    for item in import_module(sys.argv[1]).AOT:
        for arch in sys.argv[2:]:
            print(json.dumps(compile_one(item, int(arch))), flush=True)
