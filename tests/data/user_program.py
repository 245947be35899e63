"""Never run: mypy reads it as a user's program (tests/test_public_door.py), with every public name in it.

A line with `type: ignore` is a user's mistake; mypy complains where it would not have been noticed.
"""

from contextlib import AbstractContextManager
from pathlib import Path

import semiperm
from diffusers import StableDiffusionPipeline
from PIL.Image import Image
from semiperm import (
    NAG,
    SAFREE,
    SLD,
    AdaVD,
    BoundImages,
    Category,
    ClosedFormConfig,
    DetectionConfig,
    DetectionResult,
    DetectorPair,
    GateProbe,
    GuidanceError,
    KernelError,
    Keyring,
    LowRank,
    Membrane,
    MembraneConfig,
    MembraneError,
    MembraneFluxPipeline,
    MembraneMixin,
    Membranes,
    MembraneStableDiffusion3Pipeline,
    MembraneStableDiffusionPipeline,
    MembraneStableDiffusionXLPipeline,
    ModelError,
    NegativeTokenMergingConfig,
    Payload,
    Provenance,
    SafeGuidance,
    SafeGuidanceConfig,
    SafeGuidanceMixin,
    Search,
    SemipermError,
    TokenMergingError,
    TokenMergingMixin,
    TrainingConfig,
    VisualConfig,
    VisualSide,
    WatermarkError,
    WatermarkKey,
    WatermarkMixin,
    Window,
    apply_membranes,
    apply_negative_token_merging,
    apply_safe_guidance,
    detect_watermark,
    erase_concepts,
    export_lora,
    fit_detectors,
    generate_bound,
    import_membranes,
    load_detectors,
    load_keyring,
    load_membranes,
    load_pipeline,
    read_provenance,
    remove_membranes,
    remove_negative_token_merging,
    remove_safe_guidance,
    replace_noise,
    row_layout,
    save_detectors,
    save_keyring,
    save_membranes,
    sign_noise,
    train_membranes,
    update_keyring,
    write_provenance,
)
from torch import Tensor
from typing_extensions import assert_type


class Mine(MembraneMixin, SafeGuidanceMixin, TokenMergingMixin, WatermarkMixin, StableDiffusionPipeline): ...


def membranes(weight: Tensor) -> None:
    pipe = load_pipeline("canvas")
    try:
        erased = erase_concepts(pipe, ["robot"], "tree", config=ClosedFormConfig(method="rece", rank=2))
    except (MembraneError, ModelError, KernelError):
        raise
    assert_type(erased, Membranes)
    config = TrainingConfig(steps=10, layers="text", precision="bf16")
    assert_type(train_membranes(pipe, "robot|android", config=config, workdir=Path("run"), progress=print), Membranes)
    assert_type(erased[0], Membrane)
    assert_type(erased[:1] + erased[0], Membranes)
    assert_type(erased[0].modules["lora_unet_a"], LowRank)
    assert_type(erased[0].probe, GateProbe | None)
    looks = erase_concepts(pipe, ["robot"], side="image", visual=VisualConfig(rank=2), pictures={"robot": ["a.png"]})
    assert_type(looks[0].visual, VisualSide | None)
    assert_type(erased.concepts, tuple[str, ...])
    assert_type(save_membranes(erased, "a.safetensors"), Path)
    assert_type(load_membranes(["a.safetensors", Path("b.safetensors")]), Membranes)
    assert_type(export_lora(pipe, erased, "lora.safetensors"), Path)
    assert_type(import_membranes(pipe, "lora.safetensors", rank=4), Membranes)
    assert_type(MembraneConfig(strength=0.5, gate="paper", end=0.8).window, Window)
    with apply_membranes(pipe, [erased, erased[0]], MembraneConfig()) as handle:
        assert_type(handle.report(), dict)
        assert_type(handle.membranes, Membranes)
    remove_membranes(pipe)
    GateProbe(weight, 0.1, 0.9)


def layout() -> None:
    with row_layout("negative", "positive"):
        pass


def token_merging(picture: Image, image: Tensor) -> None:
    pipe = load_pipeline("canvas")
    config = NegativeTokenMergingConfig(reference=[picture, image], mask=picture, threshold=-1)
    try:
        handle = apply_negative_token_merging(pipe, config)
    except TokenMergingError:
        raise
    assert_type(handle.report(), dict)
    handle.remove()
    remove_negative_token_merging(pipe)


def guidance() -> None:
    pipe = load_pipeline("canvas")
    category = Category("own", ("a phrase",))
    pair = fit_detectors(pipe, category, benign=["a tree"])
    assert_type(pair, DetectorPair)
    assert_type(save_detectors([pair], "d.safetensors"), Path)
    assert_type(load_detectors("d.safetensors"), tuple[DetectorPair, ...])
    config = SafeGuidanceConfig(["violence", category], [SLD("max"), SAFREE(), AdaVD(), NAG(), "sld"], detectors=[pair])
    try:
        handle = apply_safe_guidance(pipe, config)
    except GuidanceError:
        raise
    assert_type(handle.report(key=b"x" * 16), dict)
    remove_safe_guidance(pipe)
    SafeGuidance(["violence"], guidance_scale=4.0).report()


def watermark(picture: Image, image: Tensor) -> None:
    pipe, ring = load_pipeline("canvas"), Keyring()
    assert_type(ring.new("studio"), WatermarkKey)
    assert_type(save_keyring(ring, "keys.json"), Path)
    assert_type(update_keyring("keys.json", lambda ring: ring.new("archive")), WatermarkKey)
    assert_type(load_keyring("keys.json"), Keyring)
    key = ring.get("studio")
    assert_type(sign_noise(pipe, key, batch=2, payload=[Payload(unique_id=1), Payload(unique_id=2)]), Tensor)
    replaced: AbstractContextManager[None] = replace_noise(pipe, image)
    layout: AbstractContextManager[None] = row_layout("negative", "positive")
    with replaced, layout:
        pass
    config = DetectionConfig(false_positive_rate=1e-9, search=Search(rotation=0))
    found = detect_watermark(pipe, [picture, image], ring, config, mask=picture, scope="studio")
    assert_type(found, list[DetectionResult])
    assert_type(found[0].payload, Payload | None)
    assert_type(found[0].p_value, float)
    bound = generate_bound(pipe, key, "a robot", guidance_scale=4)
    assert_type(bound, BoundImages)
    assert_type(bound.images, list[Image])
    try:
        assert_type(write_provenance("a.png", Provenance(model="canvas", key_id=key.key_id)), Path)
    except WatermarkError:
        raise
    assert_type(read_provenance("a.png"), Provenance | None)


def ready(image: Tensor, ring: Keyring) -> None:
    mine = Mine()
    assert_type(mine.erase_concepts(["robot"]), Membranes)
    assert_type(mine.train_membranes(["robot"]), Membranes)
    assert_type(mine.apply_membranes(mine.erase_concepts(["robot"])).report(), dict)
    assert_type(mine.import_membranes("a.safetensors"), Membranes)
    assert_type(mine.export_lora(mine.membranes, "a.safetensors"), Path)
    assert_type(mine.apply_negative_token_merging().report(), dict)
    assert_type(mine.sign_noise(ring.get(0)), Tensor)
    with mine.replace_noise(image):
        pass
    assert_type(mine.detect_watermark(image, ring), list[DetectionResult])
    assert_type(mine.generate_bound(ring.get(0), "a robot"), BoundImages)
    mine.remove_membranes()
    mine.remove_negative_token_merging()
    for pipe in (
        MembraneStableDiffusionPipeline(),
        MembraneStableDiffusionXLPipeline(),
        MembraneStableDiffusion3Pipeline(),
        MembraneFluxPipeline(),
    ):
        assert_type(pipe.membranes, Membranes)


def mistakes(ring: Keyring) -> None:
    pipe = load_pipeline("canvas")
    print(semiperm.no_such_name)  # type: ignore[attr-defined]
    MembraneConfig(merging_alpha=1)  # type: ignore[call-arg]
    erase_concepts(pipe, 3)  # type: ignore[arg-type]
    TrainingConfig(step=3)  # type: ignore[call-arg]
    detect_watermark(pipe, 3, ring)  # type: ignore[arg-type]
    sign_noise(pipe, "studio")  # type: ignore[arg-type]
    Window(0.5).contains("half")  # type: ignore[arg-type]
    error: WatermarkError = SemipermError()  # type: ignore[assignment]
    raise error
