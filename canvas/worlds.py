"""The second edition's workshop: every part trains on its own and resumes from its checkpoint."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from . import autoencoders, flow, judging, pool, precision, reading, turbo, unet, vocabulary
from .loop import load_tensors, save_tensors
from .precision import Run

TOKENIZER = "tokenizer"
PICTURES = 20_000


def _finished(workdir: Path, name: str) -> dict[str, torch.Tensor]:
    path = Path(workdir) / f"{name}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: train the part that writes it first (see canvas.worlds.PARTS)")
    return load_file(str(path))


def tokenizer_of(workdir: Path, seed: int = 0):
    """Return the tokenizer in a working folder; learnt where it is missing."""
    folder = Path(workdir) / TOKENIZER
    if not (folder / "tokenizer.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        vocabulary.build_tokenizer(seed).save_pretrained(str(folder))
    return vocabulary.load_tokenizer(folder)


def train_reading(workdir: Path, which: str, steps: int, seed: int = 0, stop_after: int | None = None) -> None:
    """Train a text encoder ("first" or "second") and write `text-<which>.safetensors`."""
    tokenizer = tokenizer_of(workdir, seed)
    encoder = vocabulary.build_encoder(which, len(tokenizer), seed)
    run = Run(Path(workdir), steps, 128, seed + (which == "second"), stop_after=stop_after)
    reading.train_encoder(encoder, tokenizer, f"reading-{which}", run)
    save_tensors(encoder.state_dict(), Path(workdir) / f"text-{which}.safetensors")


def start_canvas_autoencoder(workdir: Path, first_world: Path, seed: int = 0) -> None:
    """Write the first world's autoencoder, whitened on the second world's pictures, where none lies yet."""
    path = Path(workdir) / "vae-canvas-encoder.safetensors"
    if not path.exists():
        vae = autoencoders.build("canvas")
        vae.load_state_dict(load_tensors(first_world / "vae.safetensors"))
        autoencoders.whiten(vae, "canvas", pool.pictures(workdir, pool.CHUNK, seed).data[:600])
        save_tensors(vae.state_dict(), path)


def start_unet(workdir: Path, first_world: Path, seed: int = 0) -> None:
    """Write the UNet to begin with where none lies yet: the first world's, turned as its latents were by whitening."""
    path = Path(workdir) / "unet.start.safetensors"
    if path.exists():
        return
    mix = load_file(str(first_world / "vae.safetensors"))["quant_conv.weight"][:4, :, 0, 0].double()
    whitened = _finished(workdir, "vae-canvas-encoder")["quant_conv.weight"][:4, :, 0, 0].double()
    left, _, right = torch.linalg.svd(whitened @ torch.linalg.pinv(mix))
    first = unet.start_from(unet.build_unet(seed), load_file(str(first_world / "unet.safetensors")), left @ right)
    save_tensors(first.state_dict(), path)


def start_of(workdir: Path, part: str) -> dict[str, torch.Tensor] | None:
    """Return the weights that a part's training begins with, `<part>.start.safetensors`; None: begin anew."""
    path = Path(workdir) / f"{part}.start.safetensors"
    return load_file(str(path)) if path.exists() else None


def encode_pool(workdir: Path, which: str, pictures: int = PICTURES, seed: int = 0) -> pool.Pool:
    """Return the pool's latents for a world, encoded where they are missing."""
    vae = autoencoders.build(which)
    vae.load_state_dict(_finished(workdir, f"vae-{which}-encoder"))
    vae.eval().requires_grad_(False)
    kind = "float32"

    def encode(x):
        with precision.autocast(kind):
            return autoencoders.encode(vae, which, x)

    def timed(chosen: str) -> None:
        nonlocal kind
        kind = chosen
        encode(torch.zeros(20, 3, pool.SIZE, pool.SIZE))

    kind = precision.choose(f"encoding-{which}", timed, workdir)
    return pool.latents(workdir, which, vae, encode, pictures, seed)


def encoder_of(workdir: Path, which: str, tokenizer) -> nn.Module:
    """Return a text encoder that has learnt to read, frozen."""
    encoder = vocabulary.build_encoder(which, len(tokenizer))
    encoder.load_state_dict(_finished(workdir, f"text-{which}"))
    return encoder.eval().requires_grad_(False)


def _flow_texts(workdir: Path, seed: int):
    """The tokenizer and both text encoders, which the flow model and its distillate read."""
    tokenizer = tokenizer_of(workdir, seed)
    return tokenizer, (encoder_of(workdir, "first", tokenizer), encoder_of(workdir, "second", tokenizer))


def train_canvas(
    workdir: Path,
    steps: int,
    pictures: int = PICTURES,
    seed: int = 0,
    compile: bool = True,
    stop_after: int | None = None,
) -> None:
    """Train the UNet and write its averaged weights, `unet.ema.safetensors`."""
    tokenizer = tokenizer_of(workdir, seed)
    data, encoder = encode_pool(workdir, "canvas", pictures, seed), encoder_of(workdir, "first", tokenizer)
    run = Run(Path(workdir), steps, 48, seed, compile, stop_after)
    model = unet.train_unet(data, tokenizer, encoder, unet.build_unet(seed), run, start_of(workdir, "unet"))
    save_tensors(model.state_dict(), Path(workdir) / "unet.ema.safetensors")


def train_judge(
    workdir: Path, which: str, steps: int, pictures: int = 36_000, seed: int = 0, stop_after: int | None = None
) -> None:
    """Train a judge and write `judge-<which>.ema.safetensors`."""
    run = Run(Path(workdir), steps, 64, seed, stop_after=stop_after)
    net = judging.train_judge(which, run, pictures, start_of(workdir, f"judge-{which}"))
    save_tensors(net.state_dict(), Path(workdir) / f"judge-{which}.ema.safetensors")


def train_flow(
    workdir: Path,
    steps: int,
    pictures: int = PICTURES,
    seed: int = 0,
    compile: bool = True,
    stop_after: int | None = None,
) -> None:
    """Train the flow model and write its averaged weights, `transformer.ema.safetensors`."""
    tokenizer, encoders = _flow_texts(workdir, seed)
    data = encode_pool(workdir, "canvas-flow", pictures, seed)
    run = Run(Path(workdir), steps, 64, seed, compile, stop_after)
    model = flow.train_flow(data, tokenizer, encoders, run, start=start_of(workdir, "transformer"))
    save_tensors(model.state_dict(), Path(workdir) / "transformer.ema.safetensors")


def train_autoencoder(workdir: Path, which: str, steps: int, seed: int = 0, stop_after: int | None = None) -> None:
    """Train a world's autoencoder where the encoder is not final yet ("canvas-flow"), else its decoder alone.

    Writes `vae-<which>-encoder.safetensors`, whitened, from which latents are encoded; a second call then trains the
    decoder for them and writes `vae-<which>.final.safetensors`.
    """
    workdir = Path(workdir)
    encoded = workdir / f"vae-{which}-encoder.safetensors"
    run = Run(workdir, steps, 4, seed, stop_after=stop_after)
    drawn = pool.pictures(workdir, 6 * pool.CHUNK, seed)
    if encoded.exists():
        vae = autoencoders.build(which)
        vae.load_state_dict(load_file(str(encoded)))
        vae = autoencoders.train_autoencoder(vae, which, drawn, run, decoder=True)
        save_tensors(vae.state_dict(), workdir / f"vae-{which}.final.safetensors")
        return
    trunk = autoencoders.build("canvas")
    trunk.load_state_dict(_finished(workdir, "vae-canvas-encoder"))
    vae = autoencoders.grow(trunk, seed)
    vae = autoencoders.train_autoencoder(vae, which, drawn, run)
    autoencoders.whiten(vae, which, drawn.data[:600])
    save_tensors(vae.state_dict(), encoded)


def train_turbo(
    workdir: Path,
    steps: int,
    pictures: int = PICTURES,
    seed: int = 0,
    compile: bool = True,
    stop_after: int | None = None,
) -> None:
    """Distil the trained flow model to four steps and write the low-rank change, `turbo.ema.safetensors`."""
    tokenizer, encoders = _flow_texts(workdir, seed)
    teacher = flow.build_transformer(2 * vocabulary.WIDTH)
    teacher.load_state_dict(_finished(workdir, "transformer.ema"))
    data = encode_pool(workdir, "canvas-flow", pictures, seed)
    run = Run(Path(workdir), steps, 32, seed, compile, stop_after)
    state = turbo.train_turbo(data, tokenizer, encoders, teacher, run, start=start_of(workdir, "turbo"))
    save_tensors(state, Path(workdir) / "turbo.ema.safetensors")


# part -> (default steps, how it is trained); in the order in which parts need one another
PARTS: dict[str, tuple[int, Callable]] = {
    "reading-first": (1800, functools.partial(train_reading, which="first")),
    "reading-second": (1200, functools.partial(train_reading, which="second")),
    "vae-canvas-flow": (900, functools.partial(train_autoencoder, which="canvas-flow")),
    "decoder-canvas": (500, functools.partial(train_autoencoder, which="canvas")),
    "decoder-canvas-flow": (500, functools.partial(train_autoencoder, which="canvas-flow")),
    "judge-first": (4500, functools.partial(train_judge, which="first")),
    "judge-second": (4500, functools.partial(train_judge, which="second")),
    "canvas": (18_000, train_canvas),
    "canvas-flow": (18_000, train_flow),
    "canvas-turbo": (1100, train_turbo),
}


def train_part(part: str, workdir: Path, first_world: Path, *, steps: int | None = None, **settings) -> None:
    """Train one of PARTS, or go on with it where it stopped.

    Args:
        workdir: of checkpoints, logs and what finished parts wrote. first_world: folder of the first world's weights,
            from which the autoencoders grow and the UNet begins. steps: length of the schedule; None is the part's own.
            settings: see the part's function (seed, stop_after, pictures, compile).

    Raises: ValueError for another part, FileNotFoundError where a part before it is not finished.
    """
    if part not in PARTS:
        raise ValueError(f"no part is called {part!r}; choose from {', '.join(PARTS)}")
    default, run = PARTS[part]
    seed = settings.get("seed", 0)
    start_canvas_autoencoder(workdir, first_world, seed)
    start_unet(workdir, first_world, seed)
    run(Path(workdir), steps=default if steps is None else steps, **settings)
