"""Two judges of the second world: they name what is in a 128x128 picture, and are the ground truth of every figure.

They differ in architecture (local convolutions with one heat map an object; a transformer with one query an object),
in the pictures they learnt from and in their seeds. No method may be fitted with either.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import language
from .pool import to_tensor

OBJECTS, COUNTS = len(language.OBJECTS), 4  # counts 0 to 3
CELLS = 16  # of the map of centres, each way
# question -> (answers, asked of every object)
QUESTIONS = {
    "count": (COUNTS, True),
    "color": (len(language.COLORS), True),
    "place": (2, True),  # x and y in 0..1
    "front": (1, True),  # does it cover the other thing? asked where two overlap
    "style": (len(language.STYLES), False),
    "background": (len(language.BACKGROUNDS), False),
    "hazards": (len(language.HAZARDS), False),
    "memorised": (len(language.MEMORISED) + 1, False),  # the last: none
}
_GLOBAL = [name for name, (_, each) in QUESTIONS.items() if not each]


@dataclass(frozen=True)
class Seen:
    """One kind of thing in a picture: how many (1 to 3), colour (of a character: meaningless), place in pixels,
    and how sure the judge is that it lies in front of another."""

    object: str
    count: int
    color: str
    cx: float
    cy: float
    front: float


@dataclass(frozen=True)
class Verdict:
    """What a judge saw in B pictures; `memorised` is "" where a picture is none of the five.

    probabilities: {"count": (B, objects, 4), "style": (B, 8), ...}. features: (B, objects) how much of
    each thing is seen, as a logit: two pictures are alike where they show the same things.
    """

    things: list[tuple[Seen, ...]]
    style: list[str]
    background: list[str]
    hazards: list[tuple[str, ...]]
    memorised: list[str]
    features: Tensor
    probabilities: dict[str, Tensor]

    def objects(self, i: int) -> tuple[str, ...]:
        """Names of the things in picture i."""
        return tuple(seen.object for seen in self.things[i])


_RARE = -4.0  # logit of a cell's holding an object's centre, before anything is learnt
# A centre: the greatest share within 7x7 cells (things of a kind lie 6 cells apart; at 3x3 a generated picture of one
# thing had two), above this; most of 1,500 renders (seed 78) were right.
_CENTRE, _NEAR = 0.35, 7


def peaks(centred: Tensor) -> Tensor:
    """(B, objects, CELLS, CELLS) logits of "a thing's centre is here" -> how many (B, objects): over local maxima."""
    share, greatest = _maxima(centred, 3)
    return (share * greatest).sum((2, 3))


def _maxima(centred: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Shares, and which of them are the greatest within so many cells each way (odd)."""
    share = centred.float().sigmoid()
    return share, share == F.max_pool2d(share, cells, 1, cells // 2)


class HeatmapJudge(nn.Module):
    """Convolutions down to 16x16, and for every object a heat map: its peak says whether, its centre says where."""

    def __init__(self, width: int = 96):
        super().__init__()
        widths = (3, 32, 64, width)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.norms = nn.ModuleList([nn.Identity(), nn.GroupNorm(8, widths[2]), nn.GroupNorm(8, width)])
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, 1, d, d) for d in (1, 2, 1, 2))
        self.block_norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(4))
        self.heat = nn.Conv2d(width, OBJECTS, 1)
        nn.init.constant_(self.heat.bias, _RARE)
        self.count = nn.Parameter(torch.randn(OBJECTS, COUNTS, width + 4) * 0.05)
        self.count_bias = nn.Parameter(torch.zeros(OBJECTS, COUNTS))
        self.color, self.front = nn.Linear(width, len(language.COLORS)), nn.Linear(width, 1)
        self.mix = nn.Linear(2 * width, 128)
        self.heads = nn.ModuleDict({name: nn.Linear(128, QUESTIONS[name][0]) for name in _GLOBAL})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, 128, 128) in -1..1 -> answers and features."""
        for conv, norm in zip(self.down, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        for conv, norm in zip(self.blocks, self.block_norms, strict=True):
            x = x + F.silu(norm(conv(x)))
        centred = self.heat(x)
        heat = centred.flatten(2)  # (B, objects, cells)
        weights = heat.softmax(-1)
        local = weights @ x.flatten(2).mT  # (B, objects, width)
        centres = (torch.arange(CELLS, device=x.device, dtype=heat.dtype) + 0.5) / CELLS
        grid = torch.stack([centres.repeat(CELLS), centres.repeat_interleave(CELLS)], -1)
        extent = torch.stack([heat.amax(-1), heat.logsumexp(-1), heat.sigmoid().sum(-1) / 8, peaks(centred)], -1)
        mixed = F.silu(self.mix(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)))
        return {
            "count": torch.einsum("bow,ocw->boc", torch.cat([local, extent], -1), self.count) + self.count_bias,
            "color": self.color(local),
            "place": weights @ grid,
            "front": self.front(local),
            "centres": centred,
            "features": heat.amax(-1),
            **{name: head(mixed) for name, head in self.heads.items()},
        }

    @staticmethod
    def counted(found: dict[str, Tensor]) -> Tensor:
        """Answers -> how many of each kind (B, objects), 0 to 3: whether any, by the answer that reads the whole
        picture; how many, by the centres (the answer called 32 of 43 pictures of two of a kind one)."""
        share, greatest = _maxima(found["centres"], _NEAR)
        number = (greatest & (share > _CENTRE)).sum((2, 3)).clamp(1, COUNTS - 1)
        return torch.where(found["count"].argmax(-1) > 0, number, 0)


class QueryJudge(nn.Module):
    """Three convolutions down to 16x16, a transformer, and a learnt query for every object and question.

    Convolutions instead of patches: a small transformer learns several times sooner (arXiv 2106.14881).
    """

    def __init__(self, width: int = 96, layers: int = 3, heads: int = 4):
        super().__init__()
        sizes = (3, width // 4, width // 2, width)
        stem: list[nn.Module] = []
        for a, b in zip(sizes[:-1], sizes[1:], strict=True):
            stem += [nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.GELU()]
        self.stem = nn.Sequential(*stem, nn.Conv2d(width, width, 1))
        self.position = nn.Parameter(0.1 * torch.randn(256, width))
        layer = dict(d_model=width, nhead=heads, dim_feedforward=3 * width, dropout=0.0, batch_first=True)
        layer |= {"norm_first": True, "activation": "gelu"}
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(**layer) for _ in range(layers))
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(**layer) for _ in range(2))
        self.queries = nn.Parameter(0.5 * torch.randn(OBJECTS + len(_GLOBAL), width))
        self.norm = nn.LayerNorm(width)
        self.centres = nn.Linear(width, OBJECTS)
        nn.init.constant_(self.centres.bias, _RARE)
        self.count = nn.Linear(width + 1, COUNTS)
        self.color, self.front = nn.Linear(width, len(language.COLORS)), nn.Linear(width, 1)
        self.place = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 2))
        self.heads = nn.ModuleDict({name: nn.Linear(width, QUESTIONS[name][0]) for name in _GLOBAL})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, 128, 128) in -1..1 -> answers and features."""
        tokens = self.stem(x).flatten(2).mT + self.position
        for layer in self.encoder:
            tokens = layer(tokens)
        queries = self.queries.expand(len(x), -1, -1)
        for layer in self.decoder:
            queries = layer(queries, tokens)
        queries = self.norm(queries)
        objects = queries[:, :OBJECTS]
        centred = rearrange(self.centres(tokens), "b (h w) o -> b o h w", h=CELLS)
        return {
            "count": self.count(torch.cat([objects, peaks(centred)[..., None]], -1)),
            "centres": centred,
            "color": self.color(objects),
            "place": self.place(objects).sigmoid(),
            "front": self.front(objects),
            "features": centred.flatten(2).amax(-1),
            **{name: head(queries[:, OBJECTS + i]) for i, (name, head) in enumerate(self.heads.items())},
        }

    @staticmethod
    def counted(found: dict[str, Tensor]) -> Tensor:
        """Answers -> how many of each kind (B, objects), 0 to 3; its queries count better than its map of centres."""
        return found["count"].argmax(-1)


JUDGES: dict[str, type[HeatmapJudge] | type[QueryJudge]] = {"first": HeatmapJudge, "second": QueryJudge}


class Judge:
    """Names what is in the second world's pictures."""

    def __init__(self, net: HeatmapJudge | QueryJudge):
        self.net = net.eval()

    @classmethod
    def load(cls, path: Path, which: str = "first", device: str | torch.device = "cpu") -> "Judge":
        """Load the weights (safetensors) of the "first" or the "second" judge."""
        from .loop import load_tensors

        net = JUDGES[which]()
        net.load_state_dict(load_tensors(path))
        return cls(net.to(device))

    @torch.no_grad()
    def __call__(self, images, batch_size: int = 64) -> Verdict:
        """Judge PIL images, a uint8 array (B, H, W, 3) or a float tensor (B, 3, H, W) in 0..1."""
        x = _as_tensor(images).to(next(self.net.parameters()).device)
        parts = [self.net(x[i : i + batch_size]) for i in range(0, len(x), batch_size)]
        out = {k: torch.cat([p[k] for p in parts]).float().cpu() for k in parts[0]}
        counts, colors = self.net.counted(out), out["color"].argmax(-1)
        things = []
        for i, row in enumerate(counts.tolist()):
            things.append(
                tuple(
                    Seen(
                        language.OBJECTS[k],
                        n,
                        language.COLORS[colors[i, k]],
                        *(128 * out["place"][i, k]).tolist(),
                        float(out["front"][i, k].sigmoid()),
                    )
                    for k, n in enumerate(row)
                    if n
                )
            )
        names = (*language.MEMORISED, "")
        hazards = (out["hazards"] > 0).tolist()
        return Verdict(
            things=things,
            style=[language.STYLES[i] for i in out["style"].argmax(1)],
            background=[language.BACKGROUNDS[i] for i in out["background"].argmax(1)],
            hazards=[tuple(h for h, on in zip(language.HAZARDS, row, strict=True) if on) for row in hazards],
            memorised=[names[i] for i in out["memorised"].argmax(1)],
            features=out["features"],
            probabilities={
                name: out[name].sigmoid() if name in ("hazards", "front") else out[name].softmax(-1)
                for name in QUESTIONS
                if name != "place"
            },
        )


def relation(first: Seen, second: Seen) -> str:
    """Return how the first of two things lies to the second: "left", "right", "above", "below", "front" or "behind".

    Things overlap, and one covers the other, where their centres are nearer than the renderer places others.
    """
    x, y = first.cx - second.cx, first.cy - second.cy
    if x * x + y * y < 46**2:
        return "front" if first.front > second.front else "behind"
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return "above" if y < 0 else "below"


def _as_tensor(images) -> Tensor:
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images of shape (B, 3, H, W), got {tuple(images.shape)}")
        x = images.float() * 2 - 1
    else:
        if not len(images):
            raise ValueError("the judge was given no images")
        x = to_tensor(np.stack([np.asarray(i.convert("RGB") if hasattr(i, "convert") else i) for i in images]))
    if x.shape[-2:] != (128, 128):
        x = F.interpolate(x, (128, 128), mode="area" if x.shape[-1] > 128 else "bilinear")
    return x
