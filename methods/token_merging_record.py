"""What negative token merging did in one sampling run: the record that both faces keep and report."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Row = tuple[str, int]  # ("positive" or "negative", image of the batch)


class MergeRecord:
    """Share of pushed tokens per image, the steps, and the extra rows that were denoised. Never waits for the GPU."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget: a new run begins."""
        self.extra_rows, self.steps = 0, []
        self._sums: dict[tuple[Row, ...], tuple[Tensor, int]] = {}

    def step(self, percent: float, sigma: float, active: bool, extra_rows: int = 0) -> None:
        """One call of the denoiser; several calls at one noise level are one step."""
        self.extra_rows += extra_rows
        if not self.steps or self.steps[-1]["sigma"] != sigma:
            self.steps.append({"percent": percent, "sigma": sigma, "active": active})

    def add(self, rows: Sequence[Row], pushed: Tensor) -> None:
        """One layer's outcome: pushed (B, N) bool, of which the first len(rows) rows are images."""
        total, count = self._sums.get(tuple(rows), (0.0, 0))
        self._sums[tuple(rows)] = total + pushed[: len(rows)].float().mean(dim=1), count + 1

    @property
    def layers(self) -> int:
        """How many layer outcomes were added."""
        return sum(count for _, count in self._sums.values())

    def report(self) -> dict:
        """{"rows": [{"kind", "image", "pushed": mean share of tokens}], "steps", "extra_rows"}."""
        shares: dict[Row, list[Tensor]] = {}
        for rows, (total, count) in self._sums.items():
            for row, share in zip(rows, (total / count).tolist(), strict=True):
                shares.setdefault(row, []).append(share)
        found = sorted(shares.items(), key=lambda item: (item[0][0] != "positive", item[0][1]))
        rows = [{"kind": kind, "image": image, "pushed": sum(s) / len(s)} for (kind, image), s in found]
        return {"rows": rows, "steps": list(self.steps), "extra_rows": self.extra_rows}
