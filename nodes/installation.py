"""What is told or set once, when ComfyUI loads the pack."""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
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
            "semiperm: its nodes need %s, which ComfyUI's Python lacks; install: %s",
            " and ".join(lacking),
            install_command("-r", f'"{REQUIREMENTS}"'),
        )


def missing() -> list[str]:
    """Packages of requirements.txt that this Python does not have, and needs: some are for older ones alone."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    older = {line: re.search(r'python_version < "3\.(\d+)"', line) for line in lines}
    wanted = [line for line in lines if not older[line] or sys.version_info < (3, int(older[line][1]))]
    names = [match[0] for line in wanted if (match := re.match(r"[\w-]+", line))]
    return [name for name in names if importlib.util.find_spec(name.replace("-", "_")) is None]
