"""In ComfyUI's Python (run_in_comfyui.py): load the pack with ComfyUI's own loader and tell what it said meanwhile.

Argument: the pack's folder in custom_nodes. Prints {"loaded", "nodes": {id: display name}, "complaints": [what was
logged as a warning or worse, or warned], "foreign": modules that must not come along, but did}.
"""

import asyncio
import json
import logging
import sys
import warnings

import nodes

del sys.modules["semiperm"]  # a clone in custom_nodes has to do without
(pack,) = ARGUMENTS  # noqa: F821

known, complaints = set(nodes.NODE_CLASS_MAPPINGS), []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: complaints.append(record.getMessage())
logging.getLogger().addHandler(handler)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loaded = asyncio.run(nodes.load_custom_node(pack))
report = {
    "loaded": loaded,
    "nodes": {i: nodes.NODE_DISPLAY_NAME_MAPPINGS.get(i) for i in set(nodes.NODE_CLASS_MAPPINGS) - known},
    "complaints": complaints + [f"{warning.filename}: {warning.message}" for warning in caught],
    "foreign": [name for name in ("semiperm", "diffusers") if name in sys.modules],
}
print(json.dumps(report))
