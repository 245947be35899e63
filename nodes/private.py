"""Folders of ComfyUI's that its server does not hand out.

The server hands out every file of user/default, input, output and temp to whoever can reach it; folders of user/ that
begin with two underscores are not served.
"""

from pathlib import Path

import folder_paths


def private_folder(name: str) -> Path:
    """user/__semiperm/<name>; it may not exist yet."""
    return Path(folder_paths.get_user_directory()) / "__semiperm" / name
