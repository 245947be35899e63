"""What is told or set once, when ComfyUI loads the pack."""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path

from ..methods import errors
from ..methods.packages import install_command

logger = logging.getLogger(__name__)
REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"


def check() -> None:
    """Say which packages of requirements.txt are missing, and how to install them; give our errors a short name.

    ComfyUI shows an error's module, which in a clone is the path of a file.
    """
    for name in errors.__all__:
        getattr(errors, name).__module__ = "semiperm"
    if lacking := missing():
        logger.warning(
            "semiperm: the watermark nodes need %s, which ComfyUI's Python lacks; install: %s",
            " and ".join(lacking),
            install_command("-r", f'"{REQUIREMENTS}"'),
        )


def missing() -> list[str]:
    """Packages of requirements.txt that this Python does not have."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    names = [match[0] for line in lines if (match := re.match(r"[\w-]+", line))]
    return [name for name in names if importlib.util.find_spec(name.replace("-", "_")) is None]
