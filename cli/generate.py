"""`semiperm generate`: pictures, with any number of membranes."""

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from . import common
from .guard import guard_config, key_of

EXAMPLE = (
    'Example: semiperm generate canvas "a robot in sketch style on sky" --membrane erased.safetensors -o robot.png'
)


def run(
    model: common.Model,
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts.", metavar="PROMPT...", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png file, or a folder for several prompts.")],
    membrane: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:strength]", help="A membrane file; repeatable. Strength 0 to 1.")
    ] = None,
    concept: common.Concept = None,
    text_encoder: common.TextEncoder = "refuse",
    bias: common.Bias = "refuse",
    gate: common.Gate = "auto",
    negative_rows: common.NegativeRows = False,
    negative: Annotated[str | None, typer.Option(help="Negative prompt.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=common.MOST_SEED, help="Seed of the first picture; the next ones count up. Default: 0."
        ),
    ] = None,
    guard: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CATEGORY[:strength]",
            help="Steer away from a category of harm (`semiperm guard list`) or a .toml file; repeatable.",
        ),
    ] = None,
    guard_by: Annotated[
        str, typer.Option(metavar="NAMES", help="Algorithms of --guard: sld, safree, adavd, nag; several by commas.")
    ] = "sld",
    guard_detectors: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --guard: act only where these (`guard fit`) fire.")
    ] = None,
    when_unsafe: Annotated[
        str, typer.Option(help="With --guard-detectors, where a picture cannot be saved: guide, refuse or raise.")
    ] = "guide",
    guard_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --guard: seal its record with the secret in this file.")
    ] = None,
    sign: Annotated[
        str | None, typer.Option(metavar="NAME", help="Mark the noise with this key of --keyring. Excludes --seed.")
    ] = None,
    keyring: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A keyring, made by `semiperm keys new`.")
    ] = None,
    bind_content: Annotated[
        bool,
        typer.Option(
            "--bind-content", help="With --sign: bind the mark to what the picture shows. Takes twice as long."
        ),
    ] = False,
    provider: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --sign: who offers the program, for the provenance record.")
    ] = None,
    c2pa_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --sign: add a C2PA manifest by this certificate (PEM).")
    ] = None,
    c2pa_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The certificate's private key (PEM, no password).")
    ] = None,
    issued: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --sign: add each mark to this list, for `detect --issued`."),
    ] = None,
    steps: common.Steps = None,
    guidance: common.Guidance = None,
    device: common.Device = "auto",
    dtype: common.DType = "auto",
):
    """Generate one picture a prompt. What gates and guard did is kept in each PNG's text chunk `semiperm`.

    --guard fails closed: where it could not act, there is an error and no picture. `semiperm inspect` shows what it
    did.

    With --sign the initial noise carries a mark that `semiperm detect` reads, and the file a provenance record with
    the key's id and a unique id, which `semiperm provenance` shows.
    """
    paths = output_paths(output, prompt)
    signing = signing_options(sign, keyring, seed, bind_content, provider, c2pa_cert, c2pa_key)
    guarding = guard_config(guard or [], guard_by, guard_detectors, when_unsafe)
    seal_key = key_of(guard_key)
    if issued is not None and (signing is None or issued.exists() and not issued.is_file()):
        raise common.CliError(f"--issued {issued}: expected --sign beside it, and the name of a file")
    for text in membrane or ():
        common.split_strength(text)
    pipe = common.load_model(model, device, dtype)
    stack = common.load_stack(pipe, membrane or [], concept or [], text_encoder=text_encoder, bias=bias)
    if concept and (unheard := [name for name in concept if name not in stack.concepts]):
        nameless = sum(not one.named for one in stack)
        raise common.CliError(
            f"--concept {unheard[0]}: {len(concept)} names for {nameless} files that do not say what they erase; give"
            " one name for each such file"
        )
    sampling = common.sampling(model, steps, guidance)
    starts = seeded(seed or 0, len(prompt)) if signing is None else signed(pipe, signing, model, len(prompt))
    if negative is not None:
        sampling["negative_prompt"] = negative
    handle = applied(pipe, stack, gate, negative_rows)
    guardian = guarded(pipe, guarding)
    with common.progress("generating", len(prompt)) as advance:
        for words, path, start in zip(prompt, paths, starts, strict=True):
            image, noise = drawn(pipe, words, start, signing, sampling)
            record = {"model": model, "prompt": words, **start.origin, **sampling}
            if handle is not None:
                record |= {"membranes": list(stack.concepts), "fired": handle.report()}
            if guardian is not None:
                record["guard"] = guardian.report(seal_key)
            if signing is None:
                common.write_png(path, image, record)
            else:
                common.write_file(path, sealed(image, record, start.provenance, signing.credentials))
            if issued is not None:
                from ..methods.watermark.issued import save_issued
                from ..pipelines.watermark.sign import issued_of

                save_issued(issued_of(pipe, noise, signing.key), issued)
            advance()
    console = common.console()
    for path in paths:
        console.print(str(path), markup=False)


@dataclass(frozen=True)
class Signing:
    """How pictures are signed; whole and right before a model is loaded.

    Args:
        key: a `WatermarkKey` that can sign.
        bind_content: whether the mark says what the picture shows.
        provider: who offers the program, or None.
        credentials: what signs C2PA manifests, or None.
    """

    key: object
    bind_content: bool
    provider: str | None
    credentials: object


@dataclass(frozen=True)
class Start:
    """Where one picture begins.

    Args:
        arguments: for the call that draws it: a generator, marked latents, or the payload where content is bound.
        origin: what the picture's record says of it; no secrets.
        provenance: its provenance record; None for unsigned pictures.
    """

    arguments: dict
    origin: dict
    provenance: object = None


def signing_options(
    sign: str | None,
    keyring: Path | None,
    seed: int | None,
    bind_content: bool,
    provider: str | None,
    certificate: Path | None,
    private_key: Path | None,
) -> Signing | None:
    """What --sign and all that needs it ask for; None without --sign.

    Raises:
        CliError: options that do not go together, or a key that cannot sign.
    """
    key = signing_key(sign, keyring, seed)
    credentials = c2pa_credentials(certificate, private_key, key)
    if provider is not None and key is None:
        raise common.CliError("--provider needs --sign and --keyring: the provenance record comes with the mark")
    if bind_content and key is None:
        raise common.CliError("--bind-content needs --sign and --keyring: it is the mark that content is bound to")
    return None if key is None else Signing(key, bind_content, provider, credentials)


def signing_key(name: str | None, keyring: Path | None, seed: int | None):
    """The key to sign with, or None.

    Raises:
        CliError: half of the options, a seed, an unknown name, or a key that can only detect.
    """
    if name is None and keyring is None:
        return None
    if name is None or keyring is None:
        raise common.CliError("--sign NAME and --keyring FILE go together; give both")
    if seed is not None:
        # a seed repeats noise, and two pictures with the same marked noise give the mark away
        raise common.CliError("--seed does not go with --sign: marked noise is drawn afresh for every picture")

    from ..methods.watermark.keyring import load_keyring

    key = load_keyring(keyring).get(name)
    if key.mac_key is None:
        raise common.CliError(f"{keyring} can only detect {name!r}; sign with the keyring it was exported from")
    return key


def c2pa_credentials(certificate: Path | None, private_key: Path | None, key):
    """What signs manifests, or None; read before anything is drawn.

    Raises:
        CliError: half of the options, or nothing to name in the manifest.
    """
    if certificate is None and private_key is None:
        return None
    if certificate is None or private_key is None:
        raise common.CliError("--c2pa-cert FILE and --c2pa-key FILE go together; give both")
    if key is None:
        raise common.CliError("--c2pa-cert needs --sign and --keyring: the manifest names the mark")

    from ..methods.provenance.c2pa import load_credentials

    return load_credentials(certificate, private_key)


def applied(pipe, stack, gate: str, negative_rows: bool = False):
    """The handle of the membranes, or None without any."""
    if not len(stack):
        return None
    from ..methods.membranes.config import MembraneConfig
    from ..pipelines.membranes.apply import apply_membranes

    return apply_membranes(pipe, stack, MembraneConfig(gate=gate, negative_rows=negative_rows))


def guarded(pipe, config):
    """The handle of safe guidance, or None without --guard."""
    if config is None or config.strength == 0:
        return None
    from ..pipelines.guidance.apply import apply_safe_guidance

    return apply_safe_guidance(pipe, config)


def seeded(seed: int, count: int) -> list[Start]:
    """Plain noise for each picture, from seeds that count up."""
    return [Start({"generator": common.generators([seed + i])}, {"seed": seed + i}) for i in range(count)]


def signed(pipe, signing: Signing, model: str, count: int) -> list[Start]:
    """Marked noise for each picture, or its payload where `generate_bound` draws the noise."""
    from ..methods.provenance.record import describe
    from ..pipelines.watermark.samplers import check_scheduler
    from ..pipelines.watermark.sign import sign_noise

    check_scheduler(pipe)
    payloads = payloads_for(pipe, count)
    if signing.bind_content:
        noises = [{"payload": payload} for payload in payloads]
    else:
        noises = [{"latents": noise[None]} for noise in sign_noise(pipe, signing.key, count, payload=payloads)]
    starts = []
    for arguments, payload in zip(noises, payloads, strict=True):
        provenance = describe(model, signing.key, payload, provider=signing.provider)
        origin = {"key_id": provenance.key_id, "unique_id": provenance.unique_id}
        starts.append(Start(arguments, origin, provenance))
    return starts


def payloads_for(pipe, count: int) -> list:
    """A payload for each picture: a fresh unique id, and time and model where its latent carries them."""
    import secrets
    from time import time

    from ..methods.membranes.base_model import base_model_hash
    from ..methods.watermark.mark import Payload, capacity
    from ..pipelines.family import denoiser_of
    from ..pipelines.latents import latent_shape

    bits, said = capacity(latent_shape(pipe)), {}  # a small latent carries some fields only
    if bits.time:
        said["time"] = int(time())
    if bits.model:
        weights = {name: value for name, value in denoiser_of(pipe)[0].state_dict().items() if value.ndim == 2}
        said["model"] = int(base_model_hash(weights), 16) >> (64 - bits.model)
    return [Payload(secrets.randbits(bits.unique_id), **said) for _ in range(count)]


def drawn(pipe, prompt: str, start: Start, signing: Signing | None, sampling: dict):
    """One picture, and the marked noise that it began with."""
    if signing is None or not signing.bind_content:
        return pipe(prompt, **start.arguments, **sampling).images[0], start.arguments.get("latents")
    from ..pipelines.watermark.content import generate_bound

    made = generate_bound(pipe, signing.key, prompt, **start.arguments, **sampling)
    return made.images[0], made.latents


def sealed(image, record: dict, provenance, credentials) -> bytes:
    """A PNG with the record, the provenance record and, signed last, the C2PA manifest: whole before it is written."""
    from ..methods.provenance.picture_file import parse
    from ..methods.provenance.record import embed

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = embed(
        parse(buffer.getvalue()).with_text("semiperm", json.dumps(record, allow_nan=False)).to_bytes(), provenance
    )
    if credentials is not None:
        from ..methods.provenance.c2pa import sign

        data = sign(data, credentials)
    return data


def output_paths(output: Path, prompts: list[str]) -> list[Path]:
    """One path a prompt: the .png itself, or numbered names in the folder."""
    if output.suffix.lower() == ".png":
        if len(prompts) > 1:
            raise common.CliError(f"{len(prompts)} prompts do not fit into one file {output}; give a folder to -o")
        return [output]
    if output.suffix:
        raise common.CliError(f"-o {output}: pictures are written as .png; give a .png file or a folder")
    names = (re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48] for text in prompts)
    return [output / f"{index:03d}-{name or 'prompt'}.png" for index, name in enumerate(names)]
