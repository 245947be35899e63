"""How to install what is missing into the very Python that runs."""

from __future__ import annotations

import sys

__all__ = ["install_command"]


def install_command(*what: str) -> str:
    """The command that installs packages (or "-r FILE") for this interpreter: a bare `pip` may be another Python's.

    >>> install_command("cryptography").endswith("-m pip install cryptography")
    True
    """
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    alone = " -s" if sys.flags.no_user_site else ""  # portable ComfyUI runs so, and would not see the user's folder
    return f"{python}{alone} -m pip install {' '.join(what)}"
