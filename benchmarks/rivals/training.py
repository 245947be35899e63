"""Training for rivals: some parameters of a pipeline's parts, pictures on their way, and the bits back afterwards."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...methods.errors import MembraneError, ModelError
from ...methods.text_space import TextFeatures
from ...pipelines.family import denoiser_of, device_of
from ...pipelines.latents import latent_shape
from ...pipelines.membranes.state import MembraneHandle
from ...pipelines.prediction import Predictor
from ...pipelines.text import TOKENIZERS, encode_text
from .shared import parameters_of

encode_open: Callable[..., TextFeatures] = inspect.unwrap(encode_text)  # the same without its no_grad
_CLIP_WIDTH, _UNET_WIDTH = 768, 320  # of Stable Diffusion 1.x, for which papers give their rates


class Trainee:
    """Parameters in training."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], rate: float):
        self.parameters = parameters
        self.optimizer = torch.optim.Adam(parameters.values(), lr=rate)
        self._before = {name: parameter.data for name, parameter in parameters.items()}

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Inside, the model is the one that it was before training; for predictions without a gradient."""
        trained = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            self._give(self._before)
            with torch.no_grad():
                yield
        finally:
            self._give(trained)

    def step(self, loss: Tensor) -> float:
        """One step of the optimiser; the loss.

        Raises:
            MembraneError: it is not finite.
        """
        value = float(loss.detach())
        if not abs(value) < float("inf"):  # NaN, too
            raise MembraneError(f"the loss is {value}; expected a finite number: take a smaller rate, or fewer steps")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return value

    def values(self) -> dict[str, Tensor]:
        """What was trained, by name."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def begin(self) -> None:
        """From here on the parameters are copies."""
        self._give({name: kept.clone() for name, kept in self._before.items()})

    def end(self) -> None:
        """The parameters are their own again."""
        self._give(self._before)

    def _give(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.data = values[name]


@contextmanager
def trained(pipe, names: Sequence[str], rate: float) -> Iterator[Trainee]:
    """Inside, these parameters ("part.path") are copies that can be trained; afterwards everything is as it was.

    Raises:
        MembraneError: membranes at work on the pipeline, or a rate that is not above 0.
        ModelError: no such parameters.
    """
    if MembraneHandle.on(pipe) is not None:
        raise MembraneError("membranes are at work on this pipeline and would be trained around; remove them first")
    if not 0 < rate < float("inf"):
        raise MembraneError(f"rate={rate}; expected a number above 0, such as 1e-5")
    parameters = parameters_of(pipe, names)
    if not parameters:
        raise ModelError(
            f"0 parameters of {type(pipe).__name__} are of the kind to train; it is made for another model"
        )
    parts = [denoiser_of(pipe)[0], *(encoder for _, encoder in text_encoders(pipe))]
    flags = [(p, p.requires_grad, p.grad) for part in parts for p in part.parameters()]
    modes = [(part, part.training) for part in parts]
    trainee = Trainee(parameters, rate)
    try:
        trainee.begin()
        for part in parts:
            part.requires_grad_(False).eval()
        for parameter in parameters.values():
            parameter.grad = None
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield trainee
    finally:
        trainee.end()
        for parameter, wanted, grad in flags:
            parameter.requires_grad_(wanted)
            parameter.grad = grad
        for part, mode in modes:
            part.train(mode)


# ---- which parameters ------------------------------------------------------------------------------------------------


def text_encoders(pipe) -> list[tuple[str, nn.Module]]:
    """(attribute, encoder) of the text encoders that the pipeline has."""
    names = [f"text_encoder{name[9:]}" for name in TOKENIZERS]
    return [(name, found) for name in names if (found := getattr(pipe, name, None)) is not None]


def clip_parameters(pipe, wanted: Callable[[str, int], bool], method: str) -> list[str]:
    """Names of parameters of all of the pipeline's CLIP text encoders.

    Args:
        wanted: (path, number of layers) -> whether it is one of them.

    Raises:
        ModelError: no CLIP text encoder.
    """
    found = []
    for attribute, encoder in text_encoders(pipe):
        if type(encoder).__name__.startswith("CLIPText"):
            layers = encoder.config.num_hidden_layers
            found += [f"{attribute}.{path}" for path, _ in encoder.named_parameters() if wanted(path, layers)]
    if not found:
        raise ModelError(f"{method} trains CLIP text encoders, of which {type(pipe).__name__} has none")
    return found


def layer_of(path: str) -> int | None:
    """The number of the transformer layer that a parameter of a CLIP text encoder belongs to."""
    number = re.search(r"(^|\.)layers\.(\d+)\.", path)
    return int(number[2]) if number else None


# ---- how fast --------------------------------------------------------------------------------------------------------


def clip_rate(pipe, rate: float) -> float:
    """A paper's learning rate for CLIP-L, for this pipeline's text encoder; see `unet_rate`."""
    return rate * _CLIP_WIDTH / text_encoders(pipe)[0][1].config.hidden_size


def unet_rate(pipe, rate: float) -> float:
    """A paper's learning rate for SD 1.x, for this UNet: what Adam moves a hidden layer by goes with 1 / width.

    Source: Tensor Programs V (arXiv 2203.03466), table 3.
    """
    return rate * _UNET_WIDTH / denoiser_of(pipe)[0].config.block_out_channels[0]


# ---- what is trained on ----------------------------------------------------------------------------------------------


class Pictures:
    """Pictures on their way from noise, a sampler's step further with every step of training, and then anew.

    Args:
        count: side by side, spread over the schedule once all have begun. steps: of the sampler.
    """

    def __init__(self, predictor: Predictor, count: int, steps: int, seed: int):
        if count < 1 or steps < 2:
            raise MembraneError(f"{count} pictures of {steps} steps; expected at least one, of two steps or more")
        self.predictor, self.count, self.steps, self.taken = predictor, count, steps, 0
        self.generator = torch.Generator().manual_seed(seed)
        device = device_of(predictor.pipe)
        self.latents = torch.zeros(count, *latent_shape(predictor.pipe), device=device)
        self.times = predictor.times(steps, self.latents).to(device)
        self._begin()

    def now(self) -> tuple[Tensor, Tensor]:
        """Latents (B, C, H, W) and their timesteps (B,)."""
        return self.latents.clone(), self.times[self._positions()]

    def move(self, prediction: Tensor) -> None:
        """Go a step on with this prediction."""
        at = self._positions()
        then = self.times[[position + 1 for position in at]]
        self.latents = self.predictor.step(self.latents, prediction.detach().float(), self.times[at], then)
        self.taken += 1
        self._begin()

    def _begin(self) -> None:
        for row, position in enumerate(self._positions()):
            if position == 0:
                noise = torch.randn(self.latents.shape[1:], generator=self.generator)
                self.latents[row] = noise.to(self.latents)

    def _positions(self) -> list[int]:
        late = [row * self.steps // self.count for row in range(self.count)]
        return [max(0, self.taken - wait) % self.steps for wait in late]


def prediction_of(kind: str, image: Tensor, noise: Tensor, levels: tuple[Tensor, Tensor]) -> Tensor:
    """What a denoiser should predict at a image + s noise; the inverse of `methods.sampling.parts_of`."""
    a, s = levels
    return {"epsilon": noise, "v_prediction": a * noise - s * image, "flow": noise - image}[kind]


def rows_of(features: TextFeatures, count: int, row: int = 0) -> tuple[Tensor, Tensor | None]:
    """One row of text, for `count` pictures."""
    pooled = features.pooled
    hidden = features.hidden[row : row + 1].expand(count, -1, -1)
    return hidden, None if pooled is None else pooled[row : row + 1].expand(count, -1)
