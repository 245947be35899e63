"""The ComfyUI nodes; ComfyUI finds them through `extension`."""
