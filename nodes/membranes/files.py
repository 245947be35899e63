"""Membrane files in ComfyUI: which ones there are, what a name stands for, and where a new one goes.

A name is "<folder>/<path below it>", with "semiperm" or "loras" as the folder. Only names that folder_paths lists
are ever opened, so that a shared workflow cannot reach a file outside the models folders.
"""

import contextlib
import os
import re
from pathlib import Path

import folder_paths

from ...methods.errors import MembraneError
from ...methods.membranes.file import load_membranes
from ...methods.membranes.types import Membranes
from ...methods.membranes.zoo import ZOO

FOLDERS = ("semiperm", "loras")
SUFFIX = ".safetensors"
EXAMPLES = Path(__file__).resolve().parents[2] / "workflows" / "membranes"
_UNSAFE = re.compile(r'[\x00-\x1f<>:"|?*]')  # what some file system refuses; ":" is also a Windows drive


def register() -> None:
    """Make models/semiperm known to folder_paths, before what extra_model_paths.yaml may have said about it.

    The example files beside the workflows and the zoo come last: a workflow finds them on a fresh ComfyUI, and files of
    the same name in the models folder go first.
    """
    ours = os.path.join(folder_paths.models_dir, "semiperm")
    with contextlib.suppress(OSError):  # a read-only models folder can still be read
        os.makedirs(ours, exist_ok=True)
    known = folder_paths.folder_names_and_paths.get("semiperm", ([], set()))[0]
    paths = dict.fromkeys([ours, *known, str(EXAMPLES), str(ZOO)])
    folder_paths.folder_names_and_paths["semiperm"] = (list(paths), {SUFFIX})


def membrane_names() -> list[str]:
    """Every .safetensors file below models/semiperm and models/loras, with "/" on every system."""
    found = ((folder, name) for folder in FOLDERS for name in folder_paths.get_filename_list(folder))
    return [f"{folder}/{name.replace(os.sep, '/')}" for folder, name in found if name.lower().endswith(SUFFIX)]


def membrane_path(name: str) -> Path:
    """The file behind a listed name.

    Raises:
        MembraneError: a name that is not listed: outside the folders, not safetensors, or missing.
    """
    names = membrane_names()
    if name not in names:
        raise MembraneError(_refusal(name, names))
    folder, _, below = name.partition("/")
    path = folder_paths.get_full_path(folder, below)
    if path is None:
        raise MembraneError(f"{name!r} is a link that leads nowhere; expected a file: restore what it points to")
    return Path(path)


def _refusal(name: str, names: list[str]) -> str:
    parts = str(name).replace("\\", "/").split("/")
    if ".." in parts or parts[0] not in FOLDERS:
        return (
            f"{name!r} is outside the models folders; expected semiperm/... or loras/...: move the file to"
            " models/semiperm or models/loras, refresh (key R) and pick it from the list"
        )
    if not parts[-1].lower().endswith(SUFFIX):
        return (
            f"{name!r} is not a {SUFFIX} file; pickles (.pt, .pth, .bin, .ckpt) can run any code when loaded and are"
            " refused: convert it where you trust it, or get the safetensors version"
        )
    known = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "none yet"
    return (
        f"no membrane file {name!r}; expected one of the {len(names)} in models/semiperm and models/loras ({known}):"
        " put it there, refresh (key R) and pick it from the list"
    )


def read_membranes(name: str, concept: str = "", text_encoder: str = "refuse") -> Membranes:
    """Read the file behind a listed name; MembraneError as in `membrane_path` and `load_membranes`.

    Args:
        concept: what it erases, for a file that does not say; "" for none.
        text_encoder: "drop" leaves out what a LoRA has for the text encoder.
    """
    return load_membranes(membrane_path(name), concept.strip() or None, text_encoder=text_encoder)


def new_membrane_file(prefix: str) -> tuple[Path, str]:
    """The next free numbered file for a prefix, below the first models/semiperm folder, and the name it is listed by.

    "semiperm/" in front is the folder itself, as in the listed names: both "erased" and "semiperm/erased" give
    models/semiperm/erased_00001.safetensors, listed as semiperm/erased_00001.safetensors.

    Raises:
        MembraneError: a prefix that is empty, absolute, hidden, has "..", or characters that file names cannot have.
    """
    parts = prefix.strip().replace("\\", "/").split("/")
    parts = parts[1:] if parts[0] == "semiperm" and len(parts) > 1 else parts
    if any(not part.strip() or part.startswith(".") or _UNSAFE.search(part) for part in parts):
        raise MembraneError(
            f"cannot save below filename_prefix {prefix!r}; expected a name inside models/semiperm, such as"
            " 'semiperm/erased' or 'semiperm/people/erased', without '..', a leading '/' or '.', or any of <>:\"|?*"
        )
    *below, stem = parts
    folder = Path(folder_paths.get_folder_paths("semiperm")[0]).joinpath(*below)
    numbered = re.compile(rf"{re.escape(stem)}_(\d+){re.escape(SUFFIX)}", re.IGNORECASE)
    taken = [int(match[1]) for path in folder.glob("*") if (match := numbered.fullmatch(path.name))]
    file = f"{stem}_{max(taken, default=0) + 1:05}{SUFFIX}"
    return folder / file, "/".join(("semiperm", *below, file))


register()
