"""What happens to pictures on their way: JPEG, crops, resizing, blur, noise, light, turns, erasure, averaging.

For any watermark, in any library: pictures are tensors (B, 3, H, W) in 0..1, and an attack is named by a text.

worse = attack(pixels, "jpeg:25")
worse = attack(pixels, "crop-rescale:0.75+jpeg:50", torch.Generator().manual_seed(0))  # one after the other

Chance (places, noise, jitter) is drawn for one picture after the other, so a batch of two is two batches of one.
Strengths in pixels (blur, translate) are those of the picture given: radius 4 at 512 pixels is radius 1 at 128.
"""

from __future__ import annotations

import difflib
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..errors import WatermarkError
from ..pictures import check_pixels

__all__ = ["ATTACKS", "SUITE", "Attack", "attack", "average_forgery", "average_removal", "parse_attack"]

Generator = torch.Generator | None


@dataclass(frozen=True)
class Attack:
    """One way to change pictures.

    Args:
        name: as `attack` reads it.
        strength: the default, None where there is none to choose.
        apply: f(pixels (B, 3, H, W) float32 in 0..1, strength, generator or None) -> the same, H and W may differ.
        about: what is done, and what the strength counts.
        low, high: the range of the strength, both included; `neutral` changes nothing (None: no strength does).
        whole: whether the strength is a whole number.
    """

    name: str
    strength: float | None
    apply: Callable[[Tensor, float, Generator], Tensor]
    about: str
    low: float = 0.0
    high: float = math.inf
    neutral: float | None = None
    whole: bool = False

    def __call__(self, pixels: Tensor, strength: float | None = None, generator: Generator = None) -> Tensor:
        """Attack pictures; see `attack`.

        Raises:
            SemipermError: things that are no pictures, or a strength out of range.
        """
        strength = self.checked(strength)
        check_pixels(pixels)
        if strength is not None and strength == self.neutral:
            return pixels.clone()
        return self.apply(pixels.float(), strength, generator).clamp(0, 1).to(pixels.dtype)

    def checked(self, strength: float | None) -> float | None:
        """The strength to use, the default for None.

        Raises:
            WatermarkError: out of range, not a whole number where one is needed, or given where there is none.
        """
        if strength is None:
            return self.strength
        wanted = f"{'a whole number' if self.whole else 'a number'} from {self.low:g} to {self.high:g}"
        if self.strength is None:
            raise WatermarkError(f"attack {self.name} was given the strength {strength:g}; it has none: leave it out")
        if not self.low <= strength <= self.high or (self.whole and strength != int(strength)):
            raise WatermarkError(f"attack {self.name} was given the strength {strength:g}; expected {wanted}")
        return strength

    def label(self, strength: float | None = None) -> str:
        """The text that names this attack at a strength: "jpeg:25"."""
        strength = self.checked(strength)
        return self.name if strength is None else f"{self.name}:{strength:g}"


def attack(
    pixels: Tensor, text: str, generator: Generator = None, attacks: Mapping[str, Attack] | None = None
) -> Tensor:
    """Change pictures as a text says: a name, a name with a strength, or several joined by "+".

    Args:
        pixels: (B, 3, H, W) float in 0..1.
        text: such as "jpeg", "jpeg:25" or "resize:0.5+jpeg:50"; the names are in `ATTACKS`.
        generator: of noise, places and jitter; None uses torch's own.
        attacks: to choose from; None is `ATTACKS`. `pipelines.attacks.pictures.model_attacks` has more.

    Returns:
        (B, 3, H', W') in 0..1, dtype and device of the input; only "crop" changes the size. Not rounded to bytes.

    Raises:
        SemipermError: an unknown name, a strength out of range, or things that are no pictures.
    """
    for one, strength in parse_attack(text, attacks):
        pixels = one(pixels, strength, generator)
    return pixels


def parse_attack(text: str, attacks: Mapping[str, Attack] | None = None) -> list[tuple[Attack, float | None]]:
    """Read "name", "name:strength" or several of them joined by "+".

    Raises:
        WatermarkError: an unknown name, or a strength that is not a number or out of range.
    """
    found, attacks = [], ATTACKS if attacks is None else attacks
    for part in text.split("+"):
        name, colon, tail = part.strip().partition(":")
        if name not in attacks:
            near = difflib.get_close_matches(name.lower(), attacks, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else "choose a name from the list"
            raise WatermarkError(f"there is no attack {name!r} in {text!r}; {hint} ({', '.join(attacks)})")
        try:
            strength = float(tail) if colon else None
        except ValueError as error:
            raise WatermarkError(
                f"{tail!r} in {text!r} is not a strength; write {attacks[name].label()}, or {name} alone"
            ) from error
        found.append((attacks[name], attacks[name].checked(strength)))
    return found


def average_removal(pixels: Tensor, marked: Tensor, clean: Tensor, strength: float = 1.0) -> Tensor:
    """Take away what marked pictures share and clean ones do not: x - strength (mean(marked) - mean(clean)).

    It breaks marks that put the same pattern into every picture.

    Args:
        pixels: (B, 3, H, W) marked pictures in 0..1.
        marked, clean: (N, 3, H, W) and (M, 3, H, W) the attacker's samples; the same prompts need fewer of them.
        strength: 1 as published, 0 changes nothing.

    Raises:
        WatermarkError: pictures of different sizes, or none.

    Source: Yang et al. 2024 (arXiv 2406.09026), section 3.
    """
    return (pixels - strength * _shared(pixels, marked, clean)).clamp(0, 1)


def average_forgery(pixels: Tensor, marked: Tensor, clean: Tensor, strength: float = 1.0) -> Tensor:
    """Put onto clean pictures what marked ones share: x + strength (mean(marked) - mean(clean)); as the removal."""
    return (pixels + strength * _shared(pixels, marked, clean)).clamp(0, 1)


def _shared(pixels: Tensor, marked: Tensor, clean: Tensor) -> Tensor:
    sizes = {tuple(x.shape[1:]) for x in (pixels, marked, clean)}
    if len(sizes) > 1 or not len(marked) or not len(clean):
        raise WatermarkError(
            f"averages over {len(marked)} marked and {len(clean)} clean pictures of shapes {sorted(sizes)} were asked"
            " for; expected at least one of each, all of one size"
        )
    return marked.mean(0) - clean.mean(0)


def _draw(how: Callable, picture: Tensor, *args, generator: Generator) -> Tensor:
    """A random tensor from the generator, wherever it lives, on the picture's device."""
    return how(*args, generator=generator, device=generator.device if generator else "cpu").to(picture.device)


def _each(change: Callable[[Tensor, float, Generator], Tensor]) -> Callable[[Tensor, float, Generator], Tensor]:
    """Turn a change of one picture (3, H, W) into one of a batch."""
    return lambda pixels, strength, generator: torch.stack([change(x, strength, generator) for x in pixels])


def _jpeg(picture: Tensor, quality: float, _: Generator) -> Tensor:
    import numpy as np
    from PIL import Image

    array = (rearrange(picture, "c h w -> h w c").cpu() * 255).round().to(torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=int(quality))
    with Image.open(buffer) as image:
        decoded = np.array(image.convert("RGB"))
    return (rearrange(torch.from_numpy(decoded), "h w c -> c h w").float() / 255).to(picture.device)


def _resized(pixels: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def _resize(pixels: Tensor, factor: float, _: Generator) -> Tensor:
    height, width = pixels.shape[-2:]
    return _resized(_resized(pixels, max(1, round(height * factor)), max(1, round(width * factor))), height, width)


def _box(picture: Tensor, share: float, generator: Generator) -> tuple[slice, ...]:
    """The index of a part with this share of the area and the picture's proportions, at a random place."""
    spans = [slice(None)]
    for side in picture.shape[-2:]:
        length = max(1, round(side * math.sqrt(share)))
        first = int(_draw(torch.randint, picture, side - length + 1, (1,), generator=generator))
        spans.append(slice(first, first + length))
    return tuple(spans)


def _crop(picture: Tensor, share: float, generator: Generator) -> Tensor:
    return picture[_box(picture, share, generator)]


def _crop_pad(picture: Tensor, share: float, generator: Generator) -> Tensor:
    part = _box(picture, share, generator)
    out = torch.zeros_like(picture)
    out[part] = picture[part]
    return out


def _crop_rescale(picture: Tensor, share: float, generator: Generator) -> Tensor:
    return _resized(_crop(picture, share, generator)[None], *picture.shape[-2:])[0]


def _erase(picture: Tensor, share: float, generator: Generator) -> Tensor:
    out = picture.clone()
    out[_box(picture, share, generator)] = 0
    return out


def _blur(pixels: Tensor, sigma: float, _: Generator) -> Tensor:
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=pixels.device) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    pixels = F.conv2d(F.pad(pixels, (reach, reach, 0, 0), mode="replicate"), kernel, groups=3)
    return F.conv2d(F.pad(pixels, (0, 0, reach, reach), mode="replicate"), kernel.transpose(2, 3), groups=3)


def _noise(picture: Tensor, deviation: float, generator: Generator) -> Tensor:
    return picture + deviation * _draw(torch.randn, picture, picture.shape, generator=generator)


def _noise_legacy(picture: Tensor, deviation: float, generator: Generator) -> Tensor:
    # bytes + bytes: -1 becomes 255, and 250 + 10 becomes 4
    noise = (255 * deviation * _draw(torch.randn, picture, picture.shape, generator=generator)).trunc()
    return ((255 * picture).round() + noise).remainder(256) / 255


def _brightness(pixels: Tensor, factor: float, _: Generator) -> Tensor:
    return pixels * factor


def _brightness_jitter(picture: Tensor, reach: float, generator: Generator) -> Tensor:
    low, high = max(0.0, 1 - reach), 1 + reach
    return picture * (low + (high - low) * _draw(torch.rand, picture, 1, generator=generator))


def _grey(pixels: Tensor, _: float = 0, __: Generator = None) -> Tensor:
    weights = pixels.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # of ITU-R 601-2, as Pillow's
    return (pixels * weights).sum(1, keepdim=True).expand_as(pixels).clone()


def _contrast(pixels: Tensor, factor: float, _: Generator) -> Tensor:
    mean = _grey(pixels)[:, :1].mean((2, 3), keepdim=True)
    return mean + factor * (pixels - mean)


def _rotate(pixels: Tensor, degrees: float, _: Generator) -> Tensor:
    height, width = pixels.shape[-2:]
    if degrees % 180 == 0 or (degrees % 90 == 0 and height == width):
        return torch.rot90(pixels, int(degrees // 90), (2, 3))
    angle = math.radians(degrees)
    y = torch.arange(height, device=pixels.device).add(0.5 - height / 2)[:, None]
    x = torch.arange(width, device=pixels.device).add(0.5 - width / 2)[None]
    source = (x * math.cos(angle) - y * math.sin(angle)) / width, (x * math.sin(angle) + y * math.cos(angle)) / height
    grid = 2 * torch.stack(source, -1)
    return F.grid_sample(pixels, grid.expand(len(pixels), -1, -1, -1), padding_mode="zeros", align_corners=False)


def _translate(pixels: Tensor, distance: float, _: Generator) -> Tensor:
    height, width = pixels.shape[-2:]
    out, d = torch.zeros_like(pixels), int(distance)
    if abs(d) < min(height, width):
        here, there = slice(max(d, 0), min(d, 0) or None), slice(max(-d, 0), min(-d, 0) or None)
        out[:, :, here, here] = pixels[:, :, there, there]
    return out


# Default strengths are chosen by hand; ranges say what a strength means, and large ends only bound time and memory.
ATTACKS: dict[str, Attack] = {
    one.name: one
    for one in (
        Attack("none", None, lambda x, s, g: x, "nothing"),
        Attack("jpeg", 25, _each(_jpeg), "JPEG at this quality, 4:2:0", 1, 100, whole=True),
        Attack("crop", 0.7, _each(_crop), "a random part, cut out: share of the area", 0.01, 1, 1),
        Attack("crop-pad", 0.7, _each(_crop_pad), "a random part stays in place, black outside: share", 0.01, 1, 1),
        Attack("crop-rescale", 0.7, _each(_crop_rescale), "a random part, enlarged: share of the area", 0.01, 1, 1),
        Attack("erase", 0.2, _each(_erase), "a random part, blackened: share of the area", 0, 1, 0),
        Attack("resize", 0.5, _resize, "resized by this factor and back, bicubic", 0.01, 4, 1),
        Attack("blur", 1, _blur, "Gaussian blur: standard deviation in pixels", 0, 64, 0),
        Attack("noise", 0.05, _each(_noise), "Gaussian noise, clipped: standard deviation", 0, 1, 0),
        Attack("noise-legacy", 0.05, _each(_noise_legacy), "noise that wraps at 256, as in released codes", 0, 1, 0),
        Attack("brightness", 1.5, _brightness, "times this factor, clipped", 0, 10, 1),
        Attack("brightness-jitter", 6, _each(_brightness_jitter), "times 1 - s .. 1 + s, as in papers", 0, 10, 0),
        Attack("grey", None, _grey, "without its colours"),
        Attack("contrast", 1.5, _contrast, "distance from the mean grey times this factor", 0, 10, 1),
        Attack("rotate", 10, _rotate, "degrees counter-clockwise, size kept, black corners", -360, 360, 0),
        Attack("flip", None, lambda x, s, g: x.flip(3), "left and right exchanged"),
        Attack("flip-vertical", None, lambda x, s, g: x.flip(2), "top and bottom exchanged"),
        Attack("translate", 8, _translate, "pixels to the right and down, black behind", -4096, 4096, 0, True),
    )
}

# One or two strengths of each kind of edit that pictures meet online, and the edits that papers test; chosen by hand.
SUITE = (
    "none",
    "jpeg:50",
    "jpeg:25",
    "crop-pad:0.7",
    "crop-rescale:0.75",
    "erase:0.2",
    "resize:0.5",
    "blur:1",
    "noise:0.05",
    "noise-legacy:0.05",
    "brightness:1.5",
    "brightness-jitter:6",
    "contrast:1.5",
    "rotate:10",
    "rotate:90",
    "flip",
    "translate:8",
)
