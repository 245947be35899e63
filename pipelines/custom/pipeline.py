"""Membranes through diffusers' own door for custom pipelines; needs `pip install semiperm`.

    pipe = DiffusionPipeline.from_pretrained(MODEL, custom_pipeline=PATH_OF_THIS_FOLDER, trust_remote_code=True)
    pipe.apply_membranes(pipe.erase_concepts(["robot"]))

diffusers copies this file elsewhere and runs it there: imports must be absolute, and exactly one pipeline class may
be in sight.
"""

from diffusers import DiffusionPipeline


def _ready_classes():
    from semiperm.pipelines.membranes import pipelines as ready

    return {
        "UNet2DConditionModel": ready.MembraneStableDiffusionPipeline,
        "SD3Transformer2DModel": ready.MembraneStableDiffusion3Pipeline,
        "FluxTransformer2DModel": ready.MembraneFluxPipeline,
    }, ready.MembraneStableDiffusionXLPipeline


class MembranePipeline(DiffusionPipeline):
    """Becomes the ready class of the model's family: SD1.x, SD2, SDXL, SD3 or Flux.

    The arguments are the union of all families' components; what a model's index does not list stays None.
    """

    _optional_components = [
        "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3", "unet",
        "transformer", "scheduler", "safety_checker", "feature_extractor", "image_encoder",
    ]  # fmt: skip

    def __new__(cls, **components):
        import inspect

        by_denoiser, sdxl = _ready_classes()
        denoiser = components.get("unet") or components.get("transformer")
        ready = by_denoiser.get(type(denoiser).__name__)
        if ready is None:
            raise ValueError(
                f"a model with {type(denoiser).__name__} as denoiser is not supported; expected the SD1.x, SD2, SDXL,"
                " SD3 or Flux family"
            )
        if components.get("unet") is not None and components.get("text_encoder_2") is not None:
            ready = sdxl
        accepted = inspect.signature(ready.__init__).parameters
        given = {name: value for name, value in components.items() if name in accepted}
        for name, parameter in accepted.items():  # required, though a model may lack it (safety checker)
            if name not in ("self", *given) and parameter.default is inspect.Parameter.empty:
                given[name] = None
        return ready(**{k: v for k, v in given.items() if v is not None or k in cls._optional_components})

    def __init__(
        self,
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        text_encoder_3=None,
        tokenizer=None,
        tokenizer_2=None,
        tokenizer_3=None,
        unet=None,
        transformer=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=None,
        force_zeros_for_empty_prompt=None,
        add_watermarker=None,
    ):
        """Never runs: `__new__` returns another class. Its signature tells diffusers what to load."""
