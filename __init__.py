"""semiperm: unwanted concepts do not pass.

Every public name is loaded on first use, so that importing the package costs nothing. ComfyUI runs this file under
a module name that is a file path: no relative import may stand at module level. It finds the nodes through
`comfy_entrypoint` and their help pages in `WEB_DIRECTORY`.
"""

import importlib

WEB_DIRECTORY = "./web"
_EXPORTS = {
    # errors, and what several families share
    "KernelError": "kernels.errors",
    "MembraneError": "methods.errors",
    "ModelError": "methods.errors",
    "SemipermError": "methods.errors",
    "TokenMergingError": "methods.errors",
    "WatermarkError": "methods.errors",
    "Window": "methods.schedule",
    "load_pipeline": "pipelines.loaders",
    # membranes
    "ClosedFormConfig": "methods.membranes.closed_form",
    "GateProbe": "methods.membranes.types",
    "LowRank": "methods.membranes.types",
    "Membrane": "methods.membranes.types",
    "MembraneConfig": "methods.membranes.config",
    "MembraneFluxPipeline": "pipelines.membranes.pipelines",
    "MembraneMixin": "pipelines.membranes.pipelines",
    "MembraneStableDiffusion3Pipeline": "pipelines.membranes.pipelines",
    "MembraneStableDiffusionPipeline": "pipelines.membranes.pipelines",
    "MembraneStableDiffusionXLPipeline": "pipelines.membranes.pipelines",
    "Membranes": "methods.membranes.types",
    "apply_membranes": "pipelines.membranes.apply",
    "erase_concepts": "pipelines.membranes.erase",
    "export_lora": "pipelines.membranes.adapters",
    "import_membranes": "pipelines.membranes.adapters",
    "load_membranes": "methods.membranes.file",
    "remove_membranes": "pipelines.membranes.apply",
    "save_membranes": "methods.membranes.file",
    # negative token merging
    "NegativeTokenMergingConfig": "methods.token_merging.config",
    "TokenMergingMixin": "pipelines.token_merging.mixin",
    "apply_negative_token_merging": "pipelines.token_merging.apply",
    "remove_negative_token_merging": "pipelines.token_merging.apply",
    # watermark and provenance
    "BoundImages": "pipelines.watermark.content",
    "DetectionConfig": "methods.watermark.detection",
    "DetectionResult": "methods.watermark.detection",
    "Keyring": "methods.watermark.keyring",
    "Payload": "methods.watermark.mark",
    "Provenance": "methods.provenance.record",
    "Search": "methods.watermark.search",
    "WatermarkKey": "methods.watermark.keys",
    "WatermarkMixin": "pipelines.watermark.mixin",
    "detect_watermark": "pipelines.watermark.detect",
    "generate_bound": "pipelines.watermark.content",
    "load_keyring": "methods.watermark.keyring",
    "read_provenance": "methods.provenance.record",
    "replace_noise": "pipelines.watermark.noise",
    "save_keyring": "methods.watermark.keyring",
    "sign_noise": "pipelines.watermark.sign",
    "write_provenance": "methods.provenance.record",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return [*globals(), *__all__]


async def comfy_entrypoint():
    """Return the nodes to ComfyUI, which alone calls this."""
    return importlib.import_module(".nodes.extension", __name__).SemipermExtension()
