"""What every Triton kernel takes on each GPU generation, compiled without a GPU: registers, spills, shared memory.

    python -m semiperm.benchmarks.kernels.resources --json FILE

Needs a process without TRITON_INTERPRET. A further kernel file is a further name in KERNELS.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..timing import versions

KERNELS = (
    "token_match_merge",
    "gated_low_rank",
    "gated_projection",
    "keyed_correlation",
    "normalized_attention_guidance",
    "safe_guidance_step",
    "dual_context_attention",
)
TARGETS = {
    "sm_75": ("cuda", 75, 32),
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx90a": ("hip", "gfx90a", 64),
    "gfx942": ("hip", "gfx942", 64),
    "gfx1100": ("hip", "gfx1100", 32),
}
# Here kernels with products take torch (kernels/dispatch.py), and are not compiled.
WITHOUT_PRODUCTS = ("sm_75", "gfx1100")


class ResourceError(RuntimeError):
    """The kernels cannot be compiled here."""


def resources(targets: Iterable[str] = tuple(TARGETS), kernels: Iterable[str] = KERNELS) -> list[dict]:
    """Compile every kernel's `compile_cases()` and read what the assembler allotted, on every path that `auto` takes.

    Pointers count as aligned to 16 bytes, as torch allocates, and sizes of type "i32:16" as multiples of 16.

    Args:
        targets: names out of TARGETS. kernels: modules of `semiperm.kernels`.

    Returns:
        Rows {"name", "target", "config", "registers", "spills", "shared_bytes", "versions"}. Registers are those of a
        thread; spills are its 4-byte words of local memory on NVIDIA, and spilled registers on AMD.

    Raises:
        ResourceError: Triton is absent or interprets, or a target is unknown.
    """
    from ...kernels.dispatch import triton

    targets = list(targets)
    if triton is None:
        raise ResourceError("Triton is not installed, so there is nothing to compile; pip install triton")
    if triton.knobs.runtime.interpret:
        raise ResourceError("TRITON_INTERPRET is set, so kernels are not compiled; unset it and start again")
    if unknown := set(targets) - set(TARGETS):
        raise ResourceError(f"no target {', '.join(sorted(unknown))}; expected some of {', '.join(TARGETS)}")
    ran_with = versions("torch", "triton") | {"ptxas": _ptxas_version()}
    modules = [importlib.import_module(f"...kernels.{name}", __package__) for name in kernels]
    cases = [case for module in modules for case in module.compile_cases()]
    jobs = [
        (case, target)
        for case in cases
        for target in targets
        if not (case.get("products") and target in WITHOUT_PRODUCTS)
    ]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # much of the time is the assembler's, a process
        rows = list(pool.map(_row, *zip(*jobs, strict=True)))
    return [row | {"versions": ran_with} for row in rows]


def _row(case: dict, target: str) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case["kernel"].arg_names
    # The signature in the kernel's order, which Triton expects, with an entry for the constants too.
    types = {name: case["signature"].get(name, "constexpr") for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*") or kind.endswith(":16")
    }
    types = {name: kind.removesuffix(":16") for name, kind in types.items()}
    constexprs = case["constexprs"] | (case.get("hip", {}) if TARGETS[target][0] == "hip" else {})
    source = ASTSource(case["kernel"], types, constexprs, aligned)
    options = {"num_warps": case["num_warps"], "num_stages": case["num_stages"]}
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    config = " ".join(f"{name}={value}" for name, value in (constexprs | options).items())
    read = _amd if TARGETS[target][0] == "hip" else _nvidia
    return {"name": case["name"], "target": target, "config": config, **read(compiled)}


def _nvidia(compiled) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(_tool("cuobjdump"), "--dump-resource-usage", cubin)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    if len(found) != 3:
        raise ResourceError(f"cuobjdump names no registers, stack or local memory: {usage.strip()[-500:]}")
    return {
        "registers": found["REG"],
        "spills": (found["STACK"] + found["LOCAL"]) // 4,
        "shared_bytes": compiled.metadata.shared,
    }


def _amd(compiled) -> dict:
    found = {
        name: int(value)
        for name, value in re.findall(
            r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", compiled.asm["amdgcn"]
        )
    }
    if len(found) != 3:
        raise ResourceError("the AMD assembly names no register counts; this Triton writes another format")
    return {
        "registers": found["vgpr_count"],
        "spills": found["vgpr_spill_count"] + found["sgpr_spill_count"],
        "shared_bytes": compiled.metadata.shared,
    }


def _tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _ptxas_version() -> str:
    found = re.search(r"release ([\d.]+)", _output(_tool("ptxas"), "--version"))
    return found[1] if found else "unknown"


def _output(*command) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def main(arguments: list[str] | None = None) -> int:
    """Write the rows to --json FILE, whole or not at all. Returns the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m semiperm.benchmarks.kernels.resources", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all of them")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="default: all of them")
    options = parser.parse_args(arguments)
    try:
        rows = resources(options.target or TARGETS, options.kernel or KERNELS)
    except ResourceError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    partial = options.json.with_name(f".{options.json.name}.{os.getpid()}")
    partial.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    partial.replace(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
