"""semiperm: unwanted concepts do not pass.

Every public name is loaded on first use, so that importing the package costs nothing. ComfyUI runs this file under
a module name that is a file path: no relative import may stand at module level. It finds the nodes through
`comfy_entrypoint` and their help pages in `WEB_DIRECTORY`.
"""

import importlib

TYPE_CHECKING = False  # as in `typing`, which is not worth its import here
if TYPE_CHECKING:  # for editors and type checkers, which cannot follow `__getattr__`
    from .kernels.errors import KernelError
    from .methods.errors import (
        GuidanceError,
        MembraneError,
        ModelError,
        SemipermError,
        TokenMergingError,
        WatermarkError,
    )
    from .methods.guidance.adavd import AdaVD
    from .methods.guidance.category import Category
    from .methods.guidance.config import SafeGuidanceConfig
    from .methods.guidance.detectors import DetectorPair, load_detectors, save_detectors
    from .methods.guidance.nag import NAG
    from .methods.guidance.safree import SAFREE
    from .methods.guidance.sld import SLD
    from .methods.membranes.closed_form import ClosedFormConfig
    from .methods.membranes.config import MembraneConfig
    from .methods.membranes.file import load_membranes, save_membranes
    from .methods.membranes.types import GateProbe, LowRank, Membrane, Membranes
    from .methods.membranes.visual import VisualSide
    from .methods.membranes.visual_fit import VisualConfig
    from .methods.provenance.record import Provenance, read_provenance, write_provenance
    from .methods.schedule import Window
    from .methods.token_merging.config import NegativeTokenMergingConfig
    from .methods.training.config import TrainingConfig
    from .methods.watermark.config import DetectionConfig, DetectionResult
    from .methods.watermark.keyring import Keyring, load_keyring, save_keyring, update_keyring
    from .methods.watermark.keys import WatermarkKey
    from .methods.watermark.mark import Payload
    from .methods.watermark.search import Search
    from .pipelines.guidance.apply import apply_safe_guidance, remove_safe_guidance
    from .pipelines.guidance.fit import fit_detectors
    from .pipelines.guidance.guider import SafeGuidance
    from .pipelines.guidance.mixin import SafeGuidanceMixin
    from .pipelines.loaders import load_pipeline
    from .pipelines.membranes.adapters import export_lora, import_membranes
    from .pipelines.membranes.apply import apply_membranes, remove_membranes
    from .pipelines.membranes.erase import erase_concepts
    from .pipelines.membranes.pipelines import (
        MembraneFluxPipeline,
        MembraneMixin,
        MembraneStableDiffusion3Pipeline,
        MembraneStableDiffusionPipeline,
        MembraneStableDiffusionXLPipeline,
    )
    from .pipelines.rows import row_layout
    from .pipelines.token_merging.apply import apply_negative_token_merging, remove_negative_token_merging
    from .pipelines.token_merging.mixin import TokenMergingMixin
    from .pipelines.training.train import train_membranes
    from .pipelines.watermark.content import BoundImages, generate_bound
    from .pipelines.watermark.detect import detect_watermark
    from .pipelines.watermark.mixin import WatermarkMixin
    from .pipelines.watermark.noise import replace_noise
    from .pipelines.watermark.sign import sign_noise

WEB_DIRECTORY = "./web"
_EXPORTS = {
    # errors, and what several families share
    "GuidanceError": "methods.errors",
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
    "VisualConfig": "methods.membranes.visual_fit",
    "VisualSide": "methods.membranes.visual",
    "TrainingConfig": "methods.training.config",
    "apply_membranes": "pipelines.membranes.apply",
    "erase_concepts": "pipelines.membranes.erase",
    "export_lora": "pipelines.membranes.adapters",
    "import_membranes": "pipelines.membranes.adapters",
    "load_membranes": "methods.membranes.file",
    "remove_membranes": "pipelines.membranes.apply",
    "save_membranes": "methods.membranes.file",
    "train_membranes": "pipelines.training.train",
    # safe guidance
    "AdaVD": "methods.guidance.adavd",
    "Category": "methods.guidance.category",
    "DetectorPair": "methods.guidance.detectors",
    "NAG": "methods.guidance.nag",
    "SAFREE": "methods.guidance.safree",
    "SLD": "methods.guidance.sld",
    "SafeGuidance": "pipelines.guidance.guider",
    "SafeGuidanceConfig": "methods.guidance.config",
    "SafeGuidanceMixin": "pipelines.guidance.mixin",
    "apply_safe_guidance": "pipelines.guidance.apply",
    "fit_detectors": "pipelines.guidance.fit",
    "load_detectors": "methods.guidance.detectors",
    "remove_safe_guidance": "pipelines.guidance.apply",
    "save_detectors": "methods.guidance.detectors",
    # negative token merging
    "NegativeTokenMergingConfig": "methods.token_merging.config",
    "TokenMergingMixin": "pipelines.token_merging.mixin",
    "apply_negative_token_merging": "pipelines.token_merging.apply",
    "remove_negative_token_merging": "pipelines.token_merging.apply",
    "row_layout": "pipelines.rows",
    # watermark and provenance
    "BoundImages": "pipelines.watermark.content",
    "DetectionConfig": "methods.watermark.config",
    "DetectionResult": "methods.watermark.config",
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
    "update_keyring": "methods.watermark.keyring",
    "write_provenance": "methods.provenance.record",
}
__all__ = [
    "NAG",
    "SAFREE",
    "SLD",
    "AdaVD",
    "BoundImages",
    "Category",
    "ClosedFormConfig",
    "DetectionConfig",
    "DetectionResult",
    "DetectorPair",
    "GateProbe",
    "GuidanceError",
    "KernelError",
    "Keyring",
    "LowRank",
    "Membrane",
    "MembraneConfig",
    "MembraneError",
    "MembraneFluxPipeline",
    "MembraneMixin",
    "MembraneStableDiffusion3Pipeline",
    "MembraneStableDiffusionPipeline",
    "MembraneStableDiffusionXLPipeline",
    "Membranes",
    "ModelError",
    "NegativeTokenMergingConfig",
    "Payload",
    "Provenance",
    "SafeGuidance",
    "SafeGuidanceConfig",
    "SafeGuidanceMixin",
    "Search",
    "SemipermError",
    "TokenMergingError",
    "TokenMergingMixin",
    "TrainingConfig",
    "VisualConfig",
    "VisualSide",
    "WatermarkError",
    "WatermarkKey",
    "WatermarkMixin",
    "Window",
    "apply_membranes",
    "apply_negative_token_merging",
    "apply_safe_guidance",
    "detect_watermark",
    "erase_concepts",
    "export_lora",
    "fit_detectors",
    "generate_bound",
    "import_membranes",
    "load_detectors",
    "load_keyring",
    "load_membranes",
    "load_pipeline",
    "read_provenance",
    "remove_membranes",
    "remove_negative_token_merging",
    "remove_safe_guidance",
    "replace_noise",
    "row_layout",
    "save_detectors",
    "save_keyring",
    "save_membranes",
    "sign_noise",
    "train_membranes",
    "update_keyring",
    "write_provenance",
]


if not TYPE_CHECKING:  # a type checker would take every name for one of ours

    def __getattr__(name):
        if name in _EXPORTS:
            return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return [*globals(), *__all__]


async def comfy_entrypoint():
    """Return the nodes to ComfyUI, which alone calls this."""
    return importlib.import_module(".nodes.extension", __name__).SemipermExtension()
