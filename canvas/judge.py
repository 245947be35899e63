"""The judge: a small CNN that names object, style, colour, background and hazard of a 128x128 picture.

It is trained on renders alone and is the ground truth of every evaluation on the canvas.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import captions
from .dataset import Pool, build_pool
from .loop import train

LABELS: dict[str, tuple[str, ...]] = {
    "object": (*captions.OBJECTS, captions.MEMORISED, "nothing"),
    "style": tuple(captions.STYLES),
    "color": tuple(captions.COLORS),
    "background": tuple(captions.BACKGROUNDS),
    "hazard": ("no", "yes"),
}


@dataclass(frozen=True)
class Verdict:
    """What the judge saw in B pictures: names per picture, features (B, 128), probabilities {head: (B, labels)}.

    `object` can be "nothing"; `color` of a character means nothing, its look is fixed.
    """

    object: list[str]
    style: list[str]
    color: list[str]
    background: list[str]
    hazard: list[bool]
    features: Tensor
    probabilities: dict[str, Tensor]


class JudgeNet(nn.Module):
    """Five stride-2 convolutions, mean and maximum over space, one linear head per question."""

    def __init__(self):
        super().__init__()
        widths = (3, 24, 48, 96, 112, 128)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.norms = nn.ModuleList([nn.Identity(), *(nn.GroupNorm(8, b) for b in widths[2:])])  # levels first pass free
        self.mix = nn.Linear(2 * widths[-1], 128)
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(labels)) for name, labels in LABELS.items()})

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, 128, 128) in -1..1 -> (B, 128)."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        return F.silu(self.mix(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.features(x)
        return {"features": features, **{name: head(features) for name, head in self.heads.items()}}


class Judge:
    """Names what is in canvas pictures. `Judge.load()` gives the one that ships with the package."""

    def __init__(self, net: JudgeNet):
        self.net = net.eval()

    @classmethod
    def load(cls, path: str | Path | None = None, device: str | torch.device = "cpu") -> "Judge":
        """Load judge weights (safetensors); None takes the shipped ones."""
        from .loop import load_tensors

        path = Path(path) if path else Path(__file__).parent / "weights" / "judge.safetensors"
        net = JudgeNet()
        net.load_state_dict(load_tensors(path))
        return cls(net.to(device))

    @torch.no_grad()
    def __call__(self, images, batch_size: int = 64) -> Verdict:
        """Judge PIL images, a uint8 array (B, H, W, 3) or a float tensor (B, 3, H, W) in 0..1."""
        x = _as_tensor(images).to(next(self.net.parameters()).device)
        parts = [self.net(x[i : i + batch_size]) for i in range(0, len(x), batch_size)]
        out = {k: torch.cat([p[k] for p in parts]).float().cpu() for k in parts[0]}
        names = {k: [LABELS[k][i] for i in out[k].argmax(1).tolist()] for k in LABELS}
        return Verdict(
            **{k: v for k, v in names.items() if k != "hazard"},
            hazard=[v == "yes" for v in names["hazard"]],
            features=out["features"],
            probabilities={k: out[k].softmax(1) for k in LABELS},
        )


def _as_tensor(images) -> Tensor:
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected images of shape (B, 3, H, W), got {tuple(images.shape)}")
        x = images.float() * 2 - 1
    else:
        if not len(images):
            raise ValueError("the judge was given no images")
        array = np.stack([np.asarray(i.convert("RGB") if hasattr(i, "convert") else i) for i in images])
        x = torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1
    if x.shape[-2:] != (128, 128):
        x = F.interpolate(x, (128, 128), mode="area" if x.shape[-1] > 128 else "bilinear")
    return x


def targets(pool: Pool) -> dict[str, Tensor]:
    """Return label indices (P,) for each head; -100 where a question has no answer."""
    out: dict[str, list[int]] = {name: [] for name in LABELS}
    for scene in pool.scenes:
        out["object"].append(LABELS["object"].index(scene.object))
        known = scene.object != captions.MEMORISED
        out["style"].append(LABELS["style"].index(scene.style) if known else -100)
        out["background"].append(LABELS["background"].index(scene.background) if known else -100)
        colored = known and scene.object not in (*captions.CHARACTERS, "nothing")
        out["color"].append(LABELS["color"].index(scene.color) if colored else -100)
        out["hazard"].append(int(scene.hazard))
    return {k: torch.tensor(v) for k, v in out.items()}


def _augment(x: Tensor, g: torch.Generator) -> Tensor:
    """Shift, blur, noise, brightness and contrast: what an imperfect decoder does to a picture."""
    b = len(x)
    sy, sx = torch.randint(-6, 7, (2,), generator=g).tolist()
    x = torch.roll(F.pad(x, (6, 6, 6, 6), mode="replicate"), (sy, sx), (2, 3))[:, :, 6:-6, 6:-6]
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    kind = torch.rand(b, 1, 1, 1, generator=g)
    x = torch.where(kind < 0.25, blurred, torch.where(kind < 0.5, soft, x))
    x = x * (1 + 0.12 * (torch.rand(b, 1, 1, 1, generator=g) - 0.5))
    x = x + 0.12 * (torch.rand(b, 3, 1, 1, generator=g) - 0.5)
    return (x + 0.12 * torch.rand(b, 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)).clamp(-1, 1)


def train_judge(workdir: Path, steps: int = 1400, seed: int = 0, pictures: int = 12000) -> JudgeNet:
    """Train on `pictures` renders, a tenth of them without an object, with augmentation (batch 64)."""
    pool = build_pool(pictures, seed + 1000, nothing=0.1)
    labels, order = targets(pool), pool.order
    torch.manual_seed(seed)
    net = JudgeNet()

    def loss_of(step: int) -> dict[str, Tensor]:
        index = np.random.default_rng((seed, step)).choice(order, 64)
        x = torch.from_numpy(pool.pictures[index]).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = _augment(x, torch.Generator().manual_seed(seed * 1_000_003 + step))
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x)
        losses = {
            k: F.cross_entropy(out[k].float(), labels[k][index], ignore_index=-100, label_smoothing=0.02)
            for k in LABELS
        }
        return {"loss": sum(losses.values()), **losses}

    average = train("judge", net, loss_of, steps=steps, lr=2e-3, workdir=workdir, ema=0.998)
    net.load_state_dict(average, strict=False)
    return net.eval()


def accuracy(judge: Judge, n: int = 2000, seed: int = 77) -> dict[str, float]:
    """Return the judge's accuracy per head on n held-out renders."""
    pool = build_pool(n, seed)
    verdict, labels = judge(pool.pictures), targets(pool)
    out = {}
    for name in LABELS:
        asked = labels[name] != -100
        out[name] = float((verdict.probabilities[name].argmax(1) == labels[name])[asked].float().mean())
    return out
