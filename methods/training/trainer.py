"""One run of latent anchoring: what is drawn at each step, its gradient, validation, and what a checkpoint holds.

Pictures of every concept are drawn all the time, each a sampler's step further with every step of the optimiser, and
are trained on where they stand. SPM draws each of its latents anew, from noise, with up to 29 evaluations for one step
of the optimiser; here the evaluation that is trained on is the sampler's, too.

Everything that is drawn depends on the seed, the concept's name, the number of the picture and the step alone: not on
the other concepts, not on the number of processes, and not on where a run was resumed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import repeat
from torch import Tensor

from ..errors import MembraneError
from ..files import open_safetensors
from ..sampling import next_latents, parts_of
from .adversary import adversarial_texts
from .config import TrainingConfig
from .loop import learning_rate, load_checkpoint, save_checkpoint
from .model import Embedding, Processes, TrainedModel
from .objectives import anchoring_loss, erasing_loss, erasing_target
from .packed import PackedMembranes, seed_of
from .trajectory import expected_ratio, log_ratio, noisy_step, trajectory_loss
from .validation import Validation
from .words import Words

__all__ = ["Gates", "Trainer"]

_CLIP = 1.0  # norm of one membrane's gradient, as most trainers of adapters have it
_FLOW_RATE = 10.0  # learning rate of log Z in those of the membranes: it must follow S, and is one number; by hand

Gates = Callable[[Tensor, Tensor | None], Tensor]  # hidden (B, N, d), pooled -> (B, K), as at work


@dataclass
class _Best:
    """The state of one concept's validation."""

    loss: float = float("inf")
    step: int = 0
    misses: int = 0  # validations since
    stopped: bool = False


class Trainer:
    """Membranes in training; `packed` holds their parameters, whose hooks are in place.

    Args:
        processes: each of them draws its share of the pictures.
        stamp: what a checkpoint must have been made with to be gone on from.
        gates: through which an adversary's texts reach the membranes; None where there is no adversary.
    """

    def __init__(
        self,
        model: TrainedModel,
        words: Words,
        packed: PackedMembranes,
        processes: Processes,
        stamp: str,
        gates: Gates | None = None,
    ):
        self.model, self.words, self.packed, self.stamp, self.gates = model, words, packed, stamp, gates
        self.config: TrainingConfig = words.config
        self.processes, self.device = processes, next(iter(packed.named().values())).device
        count, world = self.config.batch_size, processes.num_processes
        if count % world:
            raise MembraneError(
                f"batch_size={count} cannot be shared by {world} processes; expected a multiple of {world}"
            )
        if self.config.adversary_steps and gates is None:
            raise MembraneError("adversary_steps without gates; expected those that the membranes have at work")
        self.mine = range(processes.process_index, count, world)
        self.latents = torch.zeros(len(packed.names), len(self.mine), *model.shape, device=self.device)
        self.seen: dict[str, Tensor] = {}  # concept -> (2, C, H, W): see `_look`
        self.times = model.times(self.config.sampling_steps, self.latents[0])
        self.best = [_Best() for _ in packed.names]
        self.kept = [{name: p.detach().clone() for name, p in own.items()} for own in packed.parameters]
        flows = len(packed.names) if self.config.objective == "trajectory" else 0
        self.flows = [torch.nn.Parameter(torch.zeros((), device=self.device)) for _ in range(flows)]
        groups = [{"params": list(packed.named().values()), "share": 1.0}]
        groups += [{"params": self.flows, "share": _FLOW_RATE}] if flows else []
        self.optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, weight_decay=0.0)
        precision = self.config.precision if self.config.precision != "no" else processes.mixed_precision
        self._half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self._half is torch.float16)
        self.pools = [words.anchors(name) for name in packed.names]
        self.unconditional = words.encode([""]) if self.config.sampling_guidance != 1 else None
        self.step = 0

    @property
    def active(self) -> list[int]:
        """The concepts that have not stopped."""
        return [k for k, best in enumerate(self.best) if not best.stopped]

    def named(self) -> dict[str, torch.nn.Parameter]:
        """All that the optimiser moves."""
        return self.packed.named() | {f"flow.{k}": flow for k, flow in enumerate(self.flows)}

    def autocast(self):
        return torch.autocast(self.device.type, self._half, enabled=self._half is not None)

    # ---- a step ----

    def train_step(self) -> dict[str, float]:
        """One step of the optimiser for every concept that has not stopped; returns the mean losses."""
        config, active = self.config, self.active
        for group in self.optimizer.param_groups:
            rate = learning_rate(self.step, config.steps, config.learning_rate, config.warmup)
            group["lr"] = rate * group["share"]
        sums = torch.zeros(3)
        backward = self._backward if config.objective == "anchoring" else self._backward_along
        for first in range(0, len(active), config.concepts_per_batch):
            sums += backward(active[first : first + config.concepts_per_batch])
        parameters = [list(self.packed.parameters[k].values()) for k in active]
        flows = [[self.flows[k]] for k in active] if self.flows else []
        self._average([p for own in [*parameters, *flows] for p in own])
        self.scaler.unscale_(self.optimizer)
        for own in parameters:
            torch.nn.utils.clip_grad_norm_(own, _CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        erasing, anchoring, opened = (self.processes.reduce(sums.to(self.device), "mean") / len(active)).tolist()
        losses = {"loss": erasing + config.anchor_weight * anchoring, "erasing": erasing, "anchoring": anchoring}
        return losses | ({"opened": opened} if config.adversary_steps else {})

    def _backward(self, group: Sequence[int]) -> Tensor:
        """Add the gradients of some concepts; returns sums of their erasing and anchoring losses and the gates."""
        config, per = self.config, len(self.mine)
        positions = [self._position(j) for j in self.mine]
        fresh = [n for n, position in enumerate(positions) if position == 0]
        for k in group:
            for n in fresh:
                self.latents[k, n] = self._noise(self.packed.names[k], self.mine[n])
        now, then = (self.times[[p + ahead for p in positions]].to(self.device).repeat(len(group)) for ahead in (0, 1))
        latents = self.latents[list(group)].flatten(0, 1)
        captions, surrogates = zip(*(self._captions(self.packed.names[k]) for k in group), strict=True)
        concept, surrogate = (self.words.encode([c for own in many for c in own]) for many in (captions, surrogates))
        anchors = _joined([self._anchors(k) for k in group])
        wide, wide_now = (repeat(t, "b ... -> (b a) ...", a=config.anchors) for t in (latents, now))
        parts = [(latents, now, concept), (latents, now, surrogate), (wide, wide_now, anchors)]
        if self.unconditional is not None:
            parts.append((latents, now, _rows(self.unconditional, len(latents))))
        with torch.no_grad(), self.autocast():
            e_concept, e_surrogate, e_anchors, *e_none = self._predict(parts)
        target = erasing_target(e_concept, e_surrogate, config.push)
        owners = [k for k in group for _ in range(per)]
        rows, aims, opened = [parts[0]], [target], torch.zeros(())
        gates = torch.ones(len(owners), device=self.device)
        opens = [gates]
        if config.adversary_steps:
            found = self._adversary(parts[0], e_concept, owners)
            with torch.no_grad():
                opens.append(self._gates(found, owners))
            rows.append((latents, now, found))
            aims.append(target)
            opened = opens[1].sum().cpu() / per
        opens.append(gates.repeat_interleave(config.anchors))
        with self.packed.on(
            [*owners * len(rows), *(k for k in owners for _ in range(config.anchors))],
            torch.cat(opens) if config.adversary_steps else None,
        ):
            with self.autocast():
                *erased, anchored = self._predict([*rows, parts[2]])
            # over the pictures of one concept a mean, over concepts the sum: each is trained as if it were alone
            erasing = erasing_loss(torch.cat(erased), torch.cat(aims)).sum() / (per * len(rows))
            anchoring = anchoring_loss(anchored, e_anchors).sum() / (per * config.anchors)
            self.scaler.scale(erasing + config.anchor_weight * anchoring).backward()
        guided, plain = (self._guided(e.detach().float(), e_none) for e in (erased[0], e_concept))
        levels = self.model.levels(now), self.model.levels(then)
        moved = next_latents(self.model.kind, latents, guided, *levels)
        self.latents[list(group)] = moved.unflatten(0, (len(group), per))
        clean = [parts_of(self.model.kind, latents, e, *levels[0])[0] for e in (plain, guided)]
        self._look(group, clean, int(torch.tensor(positions).argmax()))
        return torch.stack([erasing.detach().cpu(), anchoring.detach().cpu(), opened]).float()

    def _backward_along(self, group: Sequence[int]) -> Tensor:
        """The same by whole trajectories (trajectory.py): one way of the surrogate's for each picture."""
        config, per, kind = self.config, len(self.mine), self.model.kind
        names = [self.packed.names[k] for k in group]
        owners = [k for k in group for _ in range(per)]
        latents = torch.stack([self._noise(name, j) for name in names for j in self.mine])
        captions, surrogates = zip(*(self._captions(name) for name in names), strict=True)
        concept, surrogate = (self.words.encode([c for own in many for c in own]) for many in (captions, surrogates))
        anchors = _joined([self._anchors(k) for k in group])
        ways, ratios = [], torch.zeros(2, len(owners), device=self.device)
        anchored_at = seed_of(config.seed, "anchored", self.step) % (config.sampling_steps - 1)
        for step in range(config.sampling_steps - 1):  # the last step adds no noise, and has no density
            now, then = (self.times[step + ahead].to(self.device).expand(len(latents)) for ahead in (0, 1))
            levels = self.model.levels(now), self.model.levels(then)
            parts = [(latents, now, surrogate)]
            if self.unconditional is not None:
                parts.append((latents, now, _rows(self.unconditional, len(latents))))
            with torch.no_grad(), self.autocast():
                e_surrogate, *e_none = self._predict(parts)
                reference, sigma = noisy_step(kind, latents, self._guided(e_surrogate, e_none), *levels)
            noise = [self._noise(name, j, step + 1) for name in names for j in self.mine]
            drawn = reference + sigma * torch.stack(noise)
            way = (latents, now, levels, e_none, drawn, reference, sigma)
            with torch.no_grad():
                ratios += self._ratios(way, concept, owners)
            ways.append(way)
            latents = drawn
        flow = torch.stack([self.flows[k] for k in owners])
        # whole ways do not fit in memory: the loss's slopes along each of its numbers, and then step by step
        numbers = ratios.requires_grad_()
        with torch.enable_grad():
            losses = trajectory_loss(flow, *numbers, config.flow_target).sum() / per
            self.scaler.scale(losses).backward()
        for way in ways:
            (numbers.grad * self._ratios(way, concept, owners)).sum().backward()
        here, now, *_ = ways[anchored_at]
        wide, wide_now = (repeat(t, "b ... -> (b a) ...", a=config.anchors) for t in (here, now))
        with torch.no_grad(), self.autocast():
            (e_anchors,) = self._predict([(wide, wide_now, anchors)])
        with self.packed.on([k for k in owners for _ in range(config.anchors)]):
            with self.autocast():
                (made,) = self._predict([(wide, wide_now, anchors)])
            anchoring = anchoring_loss(made, e_anchors).sum() / (per * config.anchors)
            self.scaler.scale(config.anchor_weight * anchoring).backward()
        here, now, levels, e_none, *_ = ways[-1]
        with torch.no_grad(), self.autocast():
            (plain,) = self._predict([(here, now, concept)])
            with self.packed.on(owners):
                (erased,) = self._predict([(here, now, concept)])
        clean = [parts_of(kind, here, self._guided(e, e_none), *levels[0])[0] for e in (plain, erased)]
        self._look(group, clean, 0)
        return torch.stack([losses.detach().cpu(), anchoring.detach().cpu(), torch.zeros(())]).float()

    def _ratios(self, way: tuple, concept: Embedding, owners: list[int]) -> Tensor:
        """(2, rows): one step's terms of S and of its expectation, with a gradient where one is wanted."""
        latents, now, levels, e_none, drawn, reference, sigma = way
        with self.packed.on(owners):
            with self.autocast():
                (made,) = self._predict([(latents, now, concept)])
            mean, _ = noisy_step(self.model.kind, latents, self._guided(made, e_none), *levels)
            return torch.stack([log_ratio(drawn, mean, reference, sigma), expected_ratio(mean, reference, sigma)])

    def _guided(self, prediction: Tensor, without: Sequence[Tensor]) -> Tensor:
        scale = self.config.sampling_guidance
        return without[0] + scale * (prediction - without[0]) if without else prediction

    def _look(self, group: Sequence[int], clean: Sequence[Tensor], furthest: int) -> None:
        """Keep, for who watches, what the model makes of a picture now: by itself, and through the membrane."""
        each = [t.unflatten(0, (len(group), len(self.mine)))[:, furthest] for t in clean]
        for number, k in enumerate(group):
            self.seen[self.packed.names[k]] = torch.stack([t[number] for t in each]).detach()

    def _adversary(self, part: tuple[Tensor, Tensor, Embedding], concept: Tensor, owners: list[int]) -> Embedding:
        """Texts near the captions with which the membranes let most of the concept through; pooled ones stay."""
        latents, now, (hidden, pooled) = part

        def loss_of(asked: Tensor) -> Tensor:
            with self.packed.on(owners, self._gates((asked, pooled), owners)), self.autocast():
                return erasing_loss(self.model(latents, now, asked, pooled), concept)

        return adversarial_texts(loss_of, hidden, self.config.adversary_steps, self.config.adversary_radius), pooled

    def _gates(self, words: Embedding, owners: list[int]) -> Tensor:
        """(rows,): how far each text opens its own membrane."""
        opened = self.gates(*words).to(self.device)
        return opened[torch.arange(len(owners)), torch.tensor(owners)].float()

    def _predict(self, parts: Sequence[tuple[Tensor, Tensor, Embedding]]) -> list[Tensor]:
        """The predictions of several groups of rows, in one call of the denoiser."""
        latents, times = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        hidden, pooled = _joined([part[2] for part in parts])
        made = self.model(latents, times, hidden, pooled)
        return list(made.split([len(part[0]) for part in parts]))

    def _average(self, parameters: Sequence[Tensor]) -> None:
        """The mean of all processes' gradients, sent as one tensor."""
        if self.processes.num_processes == 1:
            return
        flat = self.processes.reduce(torch.cat([p.grad.flatten() for p in parameters]), "mean")
        for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(grad.view_as(parameter))

    # ---- what is drawn ----

    def _position(self, picture: int) -> int:
        """How many steps of its sampler a picture has taken; the pictures of a concept are spread over the schedule."""
        count = self.config.sampling_steps
        return max(0, self.step - picture * count // self.config.batch_size) % count

    def _noise(self, name: str, picture: int, *more: int) -> Tensor:
        parts = ("noise", name, picture, self.step, *more)
        return noise_of(self.latents.shape[2:], self.config.seed, *parts).to(self.device)

    def _captions(self, name: str) -> tuple[list[str], list[str]]:
        captions, surrogates = self.words.pairs(name, self.config.batch_size, self.step)
        return [captions[j] for j in self.mine], [surrogates[j] for j in self.mine]

    def _anchors(self, k: int) -> Embedding:
        name, seed = self.packed.names[k], self.config.seed
        drawn = []
        for j in self.mine:
            generator = torch.Generator().manual_seed(seed_of(seed, "anchors", name, j, self.step))
            drawn.append(self.pools[k].draw(self.config.anchors, generator))
        return _joined(drawn)

    # ---- validation ----

    def validate(self, validation: Validation) -> dict[str, dict[str, float]]:
        """Measure every concept that has not stopped; keep what is better than before, stop what no longer gets so."""
        found = {}
        for k in self.active:
            name, best = self.packed.names[k], self.best[k]
            with self.autocast():
                figures = validation.measure(k)
            loss = figures["loss"]
            if loss < best.loss:
                self.best[k] = _Best(loss, self.step)
                self.kept[k] = {n: p.detach().clone() for n, p in self.packed.parameters[k].items()}
            else:
                best.misses += 1
                best.stopped = bool(self.config.patience) and best.misses >= self.config.patience
            found[name] = figures
        return found

    # ---- checkpoints ----

    def save(self, path: Path) -> None:
        """Every process must call it; the first one writes."""
        per = self.processes.num_processes
        # (world, K, mine, ...) -> the K concepts' pictures in order
        every = self.processes.gather(self.latents[None]).transpose(0, 1).transpose(1, 2).flatten(1, 2)
        if not self.processes.is_main_process:
            return
        extra = {"latents": every if per > 1 else self.latents}
        extra |= {f"best.{k}.{name}": t for k, own in enumerate(self.kept) for name, t in own.items()}
        about = {"best": [vars(best) for best in self.best], "scaler": self.scaler.state_dict()}
        save_checkpoint(
            path,
            self.step,
            self.named(),
            [self.optimizer],
            extra,
            {"stamp": self.stamp, "state": json.dumps(about)},
        )

    def load(self, path: Path) -> None:
        """Go on from a checkpoint, with any number of processes.

        Raises:
            MembraneError: it was made with other settings, concepts or weights.
        """
        with open_safetensors(path) as file:
            made_with = (file.metadata() or {}).get("stamp")
        if made_with != self.stamp:
            raise MembraneError(
                f"{str(path)!r} is the checkpoint of another run: its settings, concepts, captions or base model"
                " differ; give the same ones to go on, or another folder to begin anew"
            )
        self.step, extra, metadata = load_checkpoint(path, self.named(), [self.optimizer])
        self.latents = extra["latents"][:, list(self.mine)].to(self.device)
        for k, own in enumerate(self.kept):
            self.kept[k] = {name: extra[f"best.{k}.{name}"].to(self.device) for name in own}
        about = json.loads(metadata["state"])
        self.best = [_Best(**fields) for fields in about["best"]]
        self.scaler.load_state_dict(about["scaler"])


def noise_of(shape: Sequence[int], seed: int, *parts: str | int) -> Tensor:
    """Gaussian noise on the CPU, by `seed_of`."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed_of(seed, *parts)))


def _rows(words: Embedding, count: int) -> Embedding:
    hidden, pooled = words
    return hidden.expand(count, -1, -1), None if pooled is None else pooled.expand(count, -1)


def _joined(parts: Sequence[Embedding]) -> Embedding:
    hidden, pooled = zip(*parts, strict=True)
    return torch.cat(hidden), None if pooled[0] is None else torch.cat(pooled)
