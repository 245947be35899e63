"""What negative token merging did in one sampling run: the record that both faces keep and report."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .config import NegativeTokenMergingConfig

Row = tuple[str, int]  # ("positive" or "negative", image of the batch)


class MergeRecord:
    """Share of pushed tokens per image, the steps, and the extra rows that were denoised. Never waits for the GPU."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget: a new run begins."""
        self.extra_rows, self.steps = 0, []
        self._sums: dict[tuple[Row, ...], tuple[Tensor, int]] = {}

    def step(self, share: float, sigma: float, active: bool, extra_rows: int = 0) -> None:
        """One call of the denoiser; several calls at one noise level are one step."""
        self.extra_rows += extra_rows
        if not self.steps or self.steps[-1]["sigma"] != sigma:
            self.steps.append({"share": share, "sigma": sigma, "active": active})

    def add(self, rows: Sequence[Row], pushed: Tensor) -> None:
        """One layer's outcome: pushed (B, N) bool, of which the first len(rows) rows are images."""
        total, count = self._sums.get(tuple(rows), (0.0, 0))
        self._sums[tuple(rows)] = total + pushed[: len(rows)].float().mean(dim=1), count + 1

    @property
    def outcomes(self) -> int:
        """How many layer outcomes were added."""
        return sum(count for _, count in self._sums.values())

    def nothing(self, config: NegativeTokenMergingConfig) -> str | None:
        """What is wrong where no token was pushed in any active step; None where one was. Waits for the GPU."""
        if not self._sums or any(bool(total.any()) for total, _ in self._sums.values()):
            return None
        return (
            f"no token of any picture was like the reference (cosine above threshold={config.threshold:g}), so nothing"
            " was pushed and the pictures are the untouched model's: lower the threshold"
        )

    def report(self, config: NegativeTokenMergingConfig, layers: int) -> dict:
        """What was pushed, in the same words in every face.

        Args:
            config: what it was set to.
            layers: how many attention layers were reached.

        Returns:
            {"mode", "references", "strength" (a list where references have their own), "threshold", "window", "layers",
            "rows": [{"kind": "positive" or "negative", "image", "pushed": mean share of tokens}],
            "steps": [{"share", "sigma", "active"}],
            "extra_rows": denoised beside the batch, over all steps}.
        """
        shares: dict[Row, list[Tensor]] = {}
        for rows, (total, count) in self._sums.items():
            for row, share in zip(rows, (total / count).tolist(), strict=True):
                shares.setdefault(row, []).append(share)
        found = sorted(shares.items(), key=lambda item: (item[0][0] != "positive", item[0][1]))
        return {
            "mode": config.mode,
            "references": len(config.reference or ()),
            "strength": list(config.strength) if isinstance(config.strength, tuple) else config.strength,
            "threshold": config.threshold,
            "window": [config.start, config.end],
            "layers": layers,
            "rows": [{"kind": kind, "image": image, "pushed": sum(s) / len(s)} for (kind, image), s in found],
            "steps": list(self.steps),
            "extra_rows": self.extra_rows,
        }
