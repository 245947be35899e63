"""`semiperm canvas train`: render, train autoencoder, judge, and denoiser with text encoder; every part resumes."""

import functools
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from . import autoencoder, denoiser, text
from .dataset import HARD, build_pool
from .judge import train_judge
from .loop import save_tensors
from .pipeline import assemble, load_pipeline, save_weights

PARTS = ("autoencoder", "judge", "denoiser")


def train_canvas(
    out: Path,
    workdir: Path,
    *,
    pictures: int = 24_000,
    autoencoder_steps: int = 1500,
    judge_steps: int = 1400,
    denoiser_steps: int = 16_000,
    seed: int = 0,
    parts: tuple[str, ...] = PARTS,
    compile: bool = True,
    start_from: Path | None = None,
) -> None:
    """Train the embedded model and write its fp16 weights, log and tokenizer to `out`.

    Args:
        out: folder of the finished weights (see pipeline.load_pipeline). workdir: folder of checkpoints and logs; run
            the same command again to resume. parts: which of PARTS to train; the others are taken from `workdir`.
        start_from: finished weights to go on from: its autoencoder is kept, its denoiser and text encoder trained on.

    Raises: ValueError for an unknown part.
    """
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"unknown parts {sorted(unknown)}; choose from {', '.join(PARTS)}")
    out, workdir = Path(out), Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if "judge" in parts:
        net = train_judge(workdir, judge_steps, seed, pictures=min(pictures, 12_000))
        save_tensors({k: v.half() for k, v in net.state_dict().items()}, out / "judge.safetensors")
        shutil.copy(workdir / "judge.log.jsonl", out / "judge.log.jsonl")
    if not {"autoencoder", "denoiser"} & set(parts):
        return
    before = load_pipeline(weights=start_from) if start_from else None
    pool = functools.cache(lambda: build_pool(pictures, seed))  # rendered only where it is needed
    finished = workdir / "vae.safetensors"
    if before is not None:
        vae = before.vae
    elif finished.exists():
        vae = autoencoder.build_autoencoder(seed)
        vae.load_state_dict(load_file(str(finished)))
    else:
        vae = autoencoder.train_autoencoder(pool(), workdir, autoencoder_steps, seed)
        autoencoder.whiten(vae, pool())
        save_tensors(vae.state_dict(), finished)
    if "denoiser" not in parts:
        return
    tokenizer = before.tokenizer if before is not None else text.build_tokenizer(seed)
    unet = before.unet if before is not None else denoiser.build_unet(seed)
    text_encoder = before.text_encoder if before is not None else text.build_text_encoder(tokenizer, seed)
    stamp = f"{pictures} pictures, seed {seed}, {HARD}"
    data = denoiser.encode_pool(vae, tokenizer, pool, seed, workdir / "latents.safetensors", stamp)
    del pool
    denoiser.train_denoiser(data, tokenizer, unet, text_encoder, workdir, denoiser_steps, seed, compile=compile)
    steps = denoiser_steps
    if start_from and (record := Path(start_from) / "training.json").exists():
        steps += json.loads(record.read_text()).get("denoiser_steps", 0)
    info = {"seed": seed, "pictures": pictures, "denoiser_steps": steps, "torch": torch.__version__}
    save_weights(assemble(vae, unet, text_encoder, tokenizer), out, info)
    for part in ("autoencoder", "denoiser"):
        if (log := workdir / f"{part}.log.jsonl").exists():
            shutil.copy(log, out / log.name)
    record = out / "training.json"
    record.with_suffix(".partial").write_text(json.dumps(info, indent=2) + "\n")
    record.with_suffix(".partial").replace(record)
