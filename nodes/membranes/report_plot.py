"""What fired, for people: a membrane report as a plain-text table and as a picture. Pillow and torch only."""

import math

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from ...methods.membranes.record import FIRED
from ...methods.pictures import from_pil

# Colours and sizes were chosen by eye.
_PANEL = 34  # concepts below each other before the next panel begins: about 1,000 pixels
_INK, _FAINT, _PAPER, _RULE = (30, 34, 40), (140, 147, 156), (255, 255, 255), (214, 219, 225)
_SHUT, _OPEN, ACTIVE, _IDLE = (241, 244, 247), (13, 83, 122), (32, 134, 98), (226, 230, 235)
_CELL, _LINE, _GAP, _LABEL = 68, 28, 28, 260  # pixels
_MAP, _MAPS = 96, 8  # side of an opening map in pixels, and how many images have one


def _gamma(report: dict, row: dict, concept: str) -> float:
    return float(row["gamma"].get(concept, 0.0))


def _summary(report: dict) -> list[str]:
    concepts, (start, end), steps = report["concepts"], report["window"], report["steps"]
    active = sum(bool(step["active"]) for step in steps)
    sigmas = f", sigma {steps[0]['sigma']:.3g} to {steps[-1]['sigma']:.3g}" if steps else ""
    plural = "" if len(concepts) == 1 else "s"
    return [
        f"{len(concepts)} concept{plural} on {report['modules']} modules, strength {report['strength']:g}",
        f"window {start:g} to {end:g}: active in {active} of {len(steps)} steps{sigmas}",
    ]


def report_text(report: dict) -> str:
    """The report of `patch.report_of` as text: a summary, concepts x rows of gates, and what never fired."""
    rows, silent = report["rows"], report["silent"]
    table = [["concept", "gate", *(f"row {row['row']} {row['kind']}" for row in rows)]]
    for concept, gate in zip(report["concepts"], report["gates"], strict=True):
        table.append([concept, gate, *(f"{_gamma(report, row, concept):.3f}" for row in rows)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    ending = f"never fired (below {FIRED:g} in every row): {', '.join(silent)}" if silent else "every membrane fired"
    if not any(step["active"] for step in report["steps"]):
        ending += "\nno step lay inside the window, so nothing was erased: widen start and end"
    return "\n".join([*_summary(report), "", *lines, "", ending])


def shade(gamma: float) -> tuple[int, ...]:
    share = min(abs(gamma), 1.0)
    return tuple(round(a + (b - a) * share) for a, b in zip(_SHUT, _OPEN, strict=True))


def _shortened(text: str, font: ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


class _Sheet:
    """A drawing with the two fonts and the layout of one report."""

    def __init__(self, report: dict, maps: dict[str, torch.Tensor]):
        self.maps = {concept: each[:_MAPS] for concept, each in maps.items()}
        self.report, self.rows, self.silent = report, report["rows"], set(report["silent"])
        self.font, self.small = ImageFont.load_default(17), ImageFont.load_default(14)
        self.labels = [_shortened(c.replace("\n", " "), self.font, _LABEL) for c in report["concepts"]]
        self.panels = max(1, math.ceil(len(self.labels) / _PANEL))
        self.height = math.ceil(len(self.labels) / self.panels)  # concepts per panel, evenly shared out
        self.label = math.ceil(max((self.font.getlength(text) for text in self.labels), default=0)) + 12
        self.panel = self.label + _CELL * len(self.rows)
        text = max(self.small.getlength(line) for line in _summary(report))
        images = max((len(each) for each in self.maps.values()), default=0)
        mapped = self.label + images * (_MAP + 8)
        self.width = max(self.panels * (self.panel + _GAP) - _GAP, math.ceil(text), mapped, 440)
        self.top = _GAP + 2 * 22 + 58
        self.bottom = self.top + _LINE * self.height + 26
        self.end = self.bottom + 92
        height = self.end + (_GAP + (_MAP + 8) * len(self.maps) + _GAP if self.maps else 0)
        self.image = Image.new("RGB", (self.width + 2 * _GAP, height), _PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def write(self, x: float, y: float, text: str, fill=_INK, font=None, anchor: str = "lm") -> None:
        self.draw.text((x, y), text, fill=fill, font=font or self.font, anchor=anchor)

    def gates(self) -> None:
        for line, text in enumerate(_summary(self.report)):
            self.write(_GAP, _GAP + 8 + 22 * line, text, font=self.small)
        for panel in range(self.panels):
            left = _GAP + panel * (self.panel + _GAP)
            for column, row in enumerate(self.rows):
                x = left + self.label + _CELL * (column + 0.5)
                self.write(x, self.top - 32, f"row {row['row']}", font=self.small, anchor="mm")
                self.write(x, self.top - 14, row["kind"], _FAINT, self.small, "mm")
            for line in range(panel * self.height, min((panel + 1) * self.height, len(self.labels))):
                self._concept(left, self.top + _LINE * (line - panel * self.height), line)

    def _concept(self, left: int, y: int, index: int) -> None:
        concept = self.report["concepts"][index]
        self.write(left, y + _LINE / 2, self.labels[index], _FAINT if concept in self.silent else _INK)
        for column, row in enumerate(self.rows):
            gamma, x = _gamma(self.report, row, concept), left + self.label + _CELL * column
            self.draw.rectangle((x, y, x + _CELL - 2, y + _LINE - 2), fill=shade(gamma))
            ink = _PAPER if abs(gamma) > 0.5 else _INK if abs(gamma) >= FIRED else _FAINT
            self.write(x + _CELL / 2 - 1, y + _LINE / 2 - 1, f"{gamma:.2f}", ink, self.small, "mm")

    def steps(self) -> None:
        steps, y = self.report["steps"], self.bottom
        self.draw.line((_GAP, y - 12, _GAP + self.width, y - 12), fill=_RULE)
        self.write(_GAP, y + 4, "steps inside the window", font=self.small)
        width = self.width / max(len(steps), 1)
        for index, step in enumerate(steps):
            x = _GAP + width * index
            right = max(x, x + width - (2 if width > 5 else 0))
            self.draw.rectangle((x, y + 20, right, y + 44), fill=ACTIVE if step["active"] else _IDLE)
        if steps:
            self.write(_GAP, y + 60, f"first, sigma {steps[0]['sigma']:.3g}", _FAINT, self.small)
            self.write(_GAP + self.width, y + 60, f"last, sigma {steps[-1]['sigma']:.3g}", _FAINT, self.small, "rm")

    def openings(self) -> None:
        """Below all: where image-side membranes opened in each image, white on black."""
        if self.maps:
            self.write(_GAP, self.end + 8, "where image-side membranes opened, in each image", font=self.small)
        for line, (concept, each) in enumerate(self.maps.items()):
            y = self.end + _GAP + line * (_MAP + 8)
            self.write(_GAP, y + _MAP / 2, _shortened(concept.replace("\n", " "), self.font, _LABEL))
            for column, found in enumerate(each):
                height, width = (max(1, round(_MAP * side / max(found.shape))) for side in found.shape)
                grey = Image.fromarray((found * 255).round().byte().numpy()).resize((width, height), Image.NEAREST)
                self.image.paste(grey.convert("RGB"), (_GAP + self.label + column * (_MAP + 8), y))


def report_plot(report: dict, maps: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """The report as IMAGE (1, H, W, 3), float 0..1: a heat map concepts x rows of gates, and a strip over the steps.

    Args:
        maps: concept -> (images, h, w) in 0..1 of image-side membranes, which then stand below.

    More than 34 concepts are set in panels side by side. Concepts that never fired are grey.
    """
    sheet = _Sheet(report, maps or {})
    sheet.gates()
    sheet.steps()
    sheet.openings()
    return rearrange(from_pil(sheet.image), "c h w -> 1 h w c")
