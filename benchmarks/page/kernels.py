"""The sections of docs/results.md about kernels: measured here, as compiled for GPUs, and by a model."""

from __future__ import annotations

from .tables import count, paragraphs, source, table

KERNELS = ("token_match_merge", "gated_low_rank", "normalized_attention_guidance", "safe_guidance_step")


def kernels(rows: list[dict]) -> str:
    """Each kernel's path on this machine beside the naive algorithm."""
    eager = [row for row in rows if row["baseline"] == "naive" and row["ratio"] is not None]
    compiled, chunks = (
        {(row["name"], row["shape"]): row for row in rows if row["baseline"] == f"naive, {how}"}
        for how in ("torch.compile", "in chunks")
    )
    cells = [
        (row["name"].rpartition("/")[2], row["shape"], f"{row['ratio']:.2f}",
         f"{compiled[row['name'], row['shape']]['ratio']:.2f}",
         f"{chunks[row['name'], row['shape']]['ratio']:.2f}" if (row["name"], row["shape"]) in chunks else "-",
         count(row["peak_bytes"]), count(row["baseline_peak_bytes"]))
        for row in eager
    ]  # fmt: skip
    slower = ", ".join(f"{cell[0]} {cell[1]} ({cell[3]})" for cell in cells if float(cell[3]) > 1) or "no shape"
    large = [
        f"{row['name'].rpartition('/')[2]} at {row['shape']} ({row['dtype']}) needs {count(row['peak_bytes'])}, where"
        f" the naive algorithm would take {count(row['baseline_peak_bytes'])} (computed, not run)."
        for row in rows
        if row.get("computed")
    ]
    return paragraphs(
        "## Kernels",
        source("kernels.json", "semiperm bench kernels --json benchmarks/results/kernels.json", rows),
        "Time in times the naive algorithm's, both in eager torch and both under `torch.compile`, and in times the"
        " naive algorithm's in chunks of 1,024 queries, which leaves the reference's own row out; memory beside inputs"
        " and outputs:",
        table(("kernel", "shape", "eager", "compiled", "in chunks", "memory", "naive's"), cells),
        *large,
        "Limits: these are the torch paths that CPUs take, not the Triton kernels, which have not been timed on a GPU"
        f" yet. Under `torch.compile` the naive form is faster than ours at {slower}.",
    )


def kernel_resources(rows: list[dict]) -> str:
    """What the compiler says of every kernel, for GPUs that are not here."""
    cells = []
    for kind in dict.fromkeys(next((k for k in KERNELS if row["name"].startswith(k)), row["name"]) for row in rows):
        for target in dict.fromkeys(row["target"] for row in rows):
            some = [row for row in rows if row["name"].startswith(kind) and row["target"] == target]
            if not some:  # there it takes torch
                continue
            shared = count(max(row["shared_bytes"] for row in some))
            cells.append(
                (
                    kind,
                    target,
                    len(some),
                    max(row["registers"] for row in some),
                    sum(row["spills"] for row in some),
                    shared,
                )
            )
    return paragraphs(
        "## Kernels as compiled",
        source(
            "kernel_resources.json",
            "semiperm bench kernels --resources --json benchmarks/results/kernel_resources.json",
            rows,
        ),
        "Configurations that are launched, compiled without a GPU: most registers of a thread, spilled words in all,"
        " most shared memory of a program:",
        table(("kernel", "target", "configurations", "registers", "spills", "shared"), cells),
        "Limits: what the compiler says, not what a device does.",
    )


def kernel_model(rows: list[dict]) -> str:
    """What the match's time on an H100 should be; a GPU has not been there to ask."""
    first, assumed = rows[0], rows[0]["assumed"]
    return paragraphs(
        "## The match on an H100, by a model",
        "[kernel_model.json](../benchmarks/results/kernel_model.json), by `semiperm bench kernels --model --json"
        " benchmarks/results/kernel_model.json`. **Not measured**: computed from bytes, operations and occupancy by"
        " [model.py](../benchmarks/kernels/model.py).",
        f"Time of token_match_merge on one {first['target']}, bfloat16, one reference, in times the released"
        " algorithm's in eager torch (which pushes the reference's own row, too), and in times the same without that"
        " row:",
        table(
            ("shape", "programs", "splits of the keys", "ours, ms", "to eager", "to eager without the reference's row"),
            [
                (
                    row["shape"],
                    row["programs"],
                    row["splits"],
                    f"{row['ms']:.3f}",
                    f"{row['ratio']:.2f}",
                    f"{row['chunks_ratio']:.2f}",
                )
                for row in rows
            ],
        ),
        f"Assumed: {assumed['l2_bytes_per_clock_and_core']} bytes a clock and core from the L2 cache, which bounds the"
        f" search; {assumed['cublas_share_of_peak']:.0%} of peak for cuBLAS; {assumed['share_of_bandwidth']:.0%} of the"
        f" memory's bandwidth; {assumed['launch_seconds'] * 1e6:g} microseconds a launch;"
        f" {assumed['epilogue_instructions']} instructions a score.",
    )
