"""`semiperm canvas train`: render, then train autoencoder, judge, and denoiser with text encoder; every part resumes."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from . import autoencoder, denoiser, text
from .dataset import build_pool
from .judge import Judge, train_judge
from .loop import save_tensors
from .pipeline import assemble, save_weights

PARTS = ("autoencoder", "judge", "denoiser")


def train_canvas(
    out: Path,
    workdir: Path,
    *,
    pictures: int = 30_000,
    autoencoder_steps: int = 2200,
    judge_steps: int = 2600,
    denoiser_steps: int = 10_000,
    seed: int = 0,
    parts: tuple[str, ...] = PARTS,
    compile: bool = True,
) -> None:
    """Train the embedded model and write its fp16 weights, log and tokenizer to `out`.

    Args:
        out: folder of the finished weights (see pipeline.load_pipeline). workdir: folder of checkpoints and logs; run
            the same command again to resume. parts: which of PARTS to train; the others are taken from `workdir`.

    Raises: ValueError for an unknown part.
    """
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"unknown parts {sorted(unknown)}; choose from {', '.join(PARTS)}")
    out, workdir = Path(out), Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if "judge" in parts:
        net = train_judge(workdir, judge_steps, seed)
        save_tensors({k: v.half() for k, v in net.state_dict().items()}, out / "judge.safetensors")
        shutil.copy(workdir / "judge.log.jsonl", out / "judge.log.jsonl")
    if not {"autoencoder", "denoiser"} & set(parts):
        return
    pool = build_pool(pictures, seed)
    finished = workdir / "vae.safetensors"
    if finished.exists():
        vae = autoencoder.build_autoencoder(seed)
        vae.load_state_dict(load_file(str(finished)))
    else:
        vae = autoencoder.train_autoencoder(pool, workdir, autoencoder_steps, seed)
        autoencoder.whiten(vae, pool)
        save_tensors(vae.state_dict(), finished)
    if "denoiser" not in parts:
        return
    tokenizer = text.build_tokenizer(seed)
    data = denoiser.encode_pool(vae, tokenizer, pool, seed, workdir / "latents.safetensors")
    del pool
    unet, text_encoder = denoiser.train_denoiser(
        data, tokenizer, text.build_text_encoder(tokenizer, seed), workdir, denoiser_steps, seed, compile=compile
    )
    info = {"seed": seed, "pictures": pictures, "denoiser_steps": denoiser_steps, "torch": torch.__version__}
    save_weights(assemble(vae, unet, text_encoder, tokenizer), out, info)
    for part in ("autoencoder", "denoiser"):
        shutil.copy(workdir / f"{part}.log.jsonl", out / f"{part}.log.jsonl")
    (out / "training.json").write_text(json.dumps(info, indent=2) + "\n")


def load_judge(out: Path) -> Judge:
    """Load the judge of a weights folder."""
    return Judge.load(Path(out) / "judge.safetensors")
