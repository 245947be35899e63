"""A model of token_match_merge's time on an H100, from bytes, operations and occupancy. A model: nothing is measured.

    search = waves x blocks x (channels' steps x max(tensor, L2) + epilogue)   cycles
    merge  = bytes / bandwidth;   eager = operations / cuBLAS + bytes / bandwidth + launches

One program fills a multiprocessor: its tiles take 96 KiB, its threads most registers. So the time is that of the
program that ends last. Where a GPU has been there to ask, its row in benchmarks/results/kernels.json takes this one's
place.
"""

from __future__ import annotations

from ...kernels.token_match_merge import CONFIGS, SHORT, cut_for

# NVIDIA's data sheet of the H100 SXM: dense bfloat16 with float32 sums, memory, cores, boost clock
PEAK, MEMORY, CORES, CLOCK = 989e12, 3.35e12, 132, 1.755e9
ASSUMED = {
    "l2_bytes_per_clock_and_core": 25,  # 5.5 to 6 TB/s as microbenchmarks of the L2 cache find it
    "cublas_share_of_peak": 0.65,  # large bfloat16 products at the power limit
    "share_of_bandwidth": 0.85,  # of elementwise kernels
    "launch_seconds": 3e-6,  # of a kernel that has to wait for the one before
    "epilogue_instructions": 8,  # of one score: scale, mask, compare, index, at 128 lanes a clock and core
}
SHAPES = {
    "Flux 1024": (2, 4096, 3072),
    "SDXL 1024, 64 x 64": (2, 4096, 640),
    "SDXL 1024, 32 x 32": (2, 1024, 1280),
    "Flux 1024, three pictures": (4, 4096, 3072),
}


def run() -> list[dict]:
    """Rows {"name", "shape", "pictures", "target", "programs", "splits", "ms": ours, "eager_ms", "ratio", "chunks_ms",
    "chunks_ratio", "measured": false, "assumed"}.

    Eager is the released algorithm, which compares the reference's row with itself, too; "chunks" leaves that row out.
    """
    rows = []
    for name, (batch, tokens, channels) in SHAPES.items():
        ours, programs, splits = kernel_seconds(batch - 1, tokens, channels)
        eager, chunks = (eager_seconds(count, tokens, channels) for count in (batch, batch - 1))
        rows.append(
            {
                "name": "negative_token_merging/token_match_merge",
                "shape": f"{name}: B{batch} N{tokens} C{channels}",
                "pictures": batch - 1,
                "target": "NVIDIA H100 80GB HBM3",
                "programs": programs,
                "splits": splits,
                "ms": round(ours * 1e3, 4),
                "eager_ms": round(eager * 1e3, 4),
                "ratio": round(ours / eager, 3),
                "chunks_ms": round(chunks * 1e3, 4),
                "chunks_ratio": round(ours / chunks, 3),
                "measured": False,
                "assumed": dict(ASSUMED),
            }
        )
    return rows


def kernel_seconds(pictures: int, tokens: int, channels: int) -> tuple[float, int, int]:
    """(seconds, programs, splits) of our three kernels, one reference of as many tokens, bfloat16."""
    config = CONFIGS["half_short" if tokens <= SHORT else "half"]
    bm, bn, bk = config["BM"], config["BN"], config["BK"]
    tiles, blocks = -(-tokens // bm), -(-tokens // bn)
    splits, steps = cut_for(pictures * tiles, blocks, CORES)
    programs = pictures * tiles * splits
    tensor = 2 * bm * bn * bk / (PEAK / CORES / CLOCK)
    cache = (bm + bn) * bk * 2 / ASSUMED["l2_bytes_per_clock_and_core"]
    epilogue = bm * bn * ASSUMED["epilogue_instructions"] / 128
    waves = -(-programs // CORES)
    search = waves * steps * (-(-channels // bk) * max(tensor, cache) + epilogue) / CLOCK
    # norms of the keys; of the queries; both once more for the push; what is written
    moved = (1 + 4 * pictures) * tokens * channels * 2 + pictures * tokens * (12 + 8 * splits)
    return search + moved / _bandwidth() + 3 * ASSUMED["launch_seconds"], programs, splits


def eager_seconds(rows: int, tokens: int, channels: int) -> float:
    """Of the released algorithm in bfloat16: a product, and some fifteen passes over x."""
    product = 2 * rows * tokens**2 * channels / (PEAK * ASSUMED["cublas_share_of_peak"])
    # norm 1, division 2, gather 2, two scalings 4, difference 3, choice 3; cosines written and read
    moved = 15 * rows * tokens * channels * 2 + 2 * rows * tokens**2 * 2
    return product + moved / _bandwidth() + 10 * ASSUMED["launch_seconds"]


def _bandwidth() -> float:
    return MEMORY * ASSUMED["share_of_bandwidth"]
