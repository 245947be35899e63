"""One training loop for all parts of the canvas models: AdamW (Muon for matrices), warm-up, cosine, EMA, checkpoints,
log, progress bar."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..methods.files import save_safetensors
from ..methods.training.loop import TrainingLog, learning_rate, load_checkpoint, save_checkpoint


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write safetensors; a stopped run leaves the previous file whole."""
    save_safetensors(tensors, path, metadata)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors as float32, which weights are in while they learn or draw."""
    return {name: tensor.float() for name, tensor in load_file(str(path)).items()}


def train(
    name: str,
    model: nn.Module,
    loss_of: Callable[[int], dict[str, Tensor]],
    *,
    steps: int,
    lr: float,
    workdir: Path,
    ema: float = 0.999,
    weight_decay: float = 0.01,
    warmup: int = 100,
    checkpoint_every: int = 200,
    stop_after: int | None = None,
    matrices: Callable[[str], bool] | None = None,
) -> dict[str, Tensor]:
    """Train `model`, resuming from `workdir/<name>.safetensors` where it exists, and return the EMA weights.

    Args:
        loss_of: step -> named losses; "loss" is minimised. Must draw its data from the step number alone, so that a
            resumed run sees what an unbroken one would have seen.
        steps: length of the schedule. stop_after: end early at this step (the checkpoint can be resumed).
        matrices: which matrices and convolution kernels (as outputs by inputs times window), by name, Muon trains
            (orthogonalised momentum, of AdamW's size: arXiv 2502.16982); None: AdamW trains all.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    path, log_path = Path(workdir) / f"{name}.safetensors", Path(workdir) / f"{name}.log.jsonl"
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    average = {k: p.detach().clone() for k, p in parameters.items()}
    flat = {  # Muon takes two dimensions; a kernel seen so shares its storage
        k: nn.Parameter(p.detach().flatten(1)) for k, p in parameters.items() if matrices and p.ndim > 1 and matrices(k)
    }
    rest = [p for k, p in parameters.items() if k not in flat]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True)
    ]
    if flat:
        optimizers.append(
            torch.optim.Muon(flat.values(), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    first, trained = 0, parameters | flat
    if path.exists():
        first, extra, _ = load_checkpoint(path, trained, optimizers)
        for k, kept in average.items():
            kept.copy_(extra[f"ema.{k}"])

    last = min(steps, stop_after or steps)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    log = TrainingLog(log_path, first)
    with Progress(*columns) as progress:
        bar = progress.add_task(name, total=last, completed=first)
        for step in range(first, last):
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = learning_rate(step, steps, lr, warmup)
            losses = loss_of(step)
            losses["loss"].backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            for k, p in flat.items():
                p.grad = parameters[k].grad.flatten(1)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            model.zero_grad(set_to_none=True)
            decay = min(ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.values()), [p.data for p in parameters.values()], 1 - decay)
            log.count(**{k: float(v.detach()) for k, v in losses.items()})
            if (step + 1) % 100 == 0 or step + 1 == last:
                log.write(step + 1)
            if (step + 1) % checkpoint_every == 0 or step + 1 == last:
                save_checkpoint(path, step + 1, trained, optimizers, {f"ema.{k}": v for k, v in average.items()})
            progress.update(bar, advance=1, description=f"{name} {float(losses['loss'].detach()):.4f}")
    return average
