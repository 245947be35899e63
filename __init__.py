"""semiperm: unwanted concepts do not pass.

Every public name is loaded on first use, so that importing the package costs nothing. ComfyUI runs this file under
a module name that is a file path: no relative import may stand at module level. It finds the nodes through
`comfy_entrypoint` and their help pages in `WEB_DIRECTORY`.
"""

import importlib

WEB_DIRECTORY = "./web"
_EXPORTS = {
    "MembraneConfig": "pipelines.membranes",
    "NegativeTokenMergingConfig": "methods.negative_token_merging",
    "apply_membranes": "pipelines.membranes",
    "apply_negative_token_merging": "pipelines.negative_token_merging",
    "detect": "pipelines.watermark",
    "erase_concepts": "pipelines.membranes",
    "generate_bound": "pipelines.content_binding",
    "load_membranes": "methods.membranes",
    "remove_membranes": "pipelines.membranes",
    "remove_negative_token_merging": "pipelines.negative_token_merging",
    "save_membranes": "methods.membranes",
    "sign_noise": "pipelines.watermark",
    "signed_noise": "pipelines.watermark_noise",
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
