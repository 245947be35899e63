"""Write the UI graph and the thumbnail of every workflow from api/<name>.json, the one description of it; also the
texts of all nodes in English (locales/en/nodeDefs.json) and the subgraph blueprints (subgraphs/).

    python workflows/build.py http://127.0.0.1:8188

The address is that of a running ComfyUI with semiperm in it: it tells which inputs are widgets, and it renders the
thumbnails by running the workflows; those for checkpoints that are not here get a drawing of their graph.
`--no-pictures` writes the graphs only. Names that follow choose among the workflows.
"""

import io
import json
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

from blueprints import BLUEPRINTS, blueprint

HERE = Path(__file__).resolve().parent
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
THUMBNAIL_WIDTH = 400
TALLER = 10  # px: ComfyUI's Vue nodes beside its classic ones, whose sizes these are
GAP = 60  # between columns; between nodes of a column half of it, the title bar and TALLER
TITLE_BAR = 30

# Stage -> its node classes, or titles of single nodes; the stages stand from left to right, each in a group of its own.
STAGES = {
    "Model and prompts": ("SemipermLoadCanvas", "CheckpointLoaderSimple", "CLIPTextEncode", "EmptyLatentImage"),
    "Membranes": (
        "SemipermEraseConcept",
        "SemipermSolveMembranes",
        "SemipermTrainMembranes",
        "SemipermLoadMembrane",
        "SemipermApplyMembranes",
        "SemipermSaveMembrane",
    ),
    "Reference": ("The reference picture", "Decode the reference"),
    "Negative token merging": ("SemipermNegativeTokenMerging", "SemipermNegativeTokenMergingAdvanced"),
    "Safe guidance": (
        "SemipermSafeGuidance",
        "SemipermSafeGuidanceAdvanced",
        "SemipermPromptFilter",
        "SemipermValueDecomposer",
        "SemipermNAG",
        "SemipermSafeGuider",
    ),
    "Watermark": (
        "SemipermKeyring",
        "SemipermWatermarkModel",
        "SemipermWatermarkNoise",
        "KSamplerSelect",
        "RandomNoise",
    ),
    "Mask": ("SolidMask", "MaskComposite"),
    "Sampling": (
        "KSampler",
        "CFGGuider",
        "BasicScheduler",
        "LatentUpscale",
        "SamplerCustomAdvanced",
        "SetLatentNoiseMask",
        "VAEDecode",
    ),
    "Detection": ("SemipermAttackSuite", "ImageBatch", "PrimitiveStringMultiline", "SemipermDetectWatermark"),
    "Pictures": (
        "ImageStitch",
        "ImageFromBatch",
        "SaveImage",
        "SemipermMembraneReport",
        "SemipermSaveWithProvenance",
        "SemipermTokenMergingReport",
        "SemipermGuidanceReport",
    ),
}
COLORS = ("#3f789e", "#8a5ea8", "#7a7f3a", "#9b4f6b", "#3a7f7a", "#857a52", "#4f8a5b", "#6b5ea8", "#a1763f", "#5e6ea8")
SIZES = {  # of nodes that show a text field or a picture
    "CLIPTextEncode": (340, 120),
    "PrimitiveStringMultiline": (300, 120),
    "SaveImage": (380, 340),
    "SemipermAttackSuite": (320, 280),
    "SemipermDetectWatermark": (560, 760),
    "SemipermEraseConcept": (340, 300),
    "SemipermKeyring": (420, 230),
    "SemipermMembraneReport": (440, 520),
    "SemipermSaveMembrane": (340, 160),
    "SemipermSaveWithProvenance": (560, 520),
    "SemipermSolveMembranes": (360, 520),
    "SemipermTokenMergingReport": (400, 300),
    "SemipermTrainMembranes": (380, 760),
    "SemipermGuidanceReport": (420, 300),
    "SemipermSafeGuidance": (340, 220),
}

SWITCH = (
    "\n\n**With a real checkpoint:** replace *Load Canvas* by *Load Checkpoint* (`CheckpointLoaderSimple`), set the "
    "latent to the model's own size (512x512 for SD 1.x) and write your own prompt and concept."
)
KEYS = (
    "\n\nThe keyring `my_keys.json` is made in `user/__semiperm/keyrings` when there is none. It is the secret: keep a "
    "copy, give it to nobody. The workflow holds its name alone."
) + SWITCH.replace(" and concept", "")
CHECKPOINT = (
    "\n\nChoose your file in *Load Checkpoint* (`CheckpointLoaderSimple`); any fine-tune of {family} will do. Prompts "
    "that do not name the concept keep every bit. If other words bring it back, add them behind a bar, or take the "
    "preset *strict*. Everything else that can be set is in *Solve Membranes* and *Apply Membranes*."
)
NOTES = {
    "Erase a style, SD 1.5": "## Erase a style, Stable Diffusion 1.5\nThe same "
    "prompt and seed twice, at 512x512: by the checkpoint as it is (left), and "
    "without the painter (right). Solving takes seconds, and another strength "
    "is not solved again." + CHECKPOINT.format(family="SD 1.x"),
    "Erase a style, SDXL": "## Erase a style, SDXL\nThe same prompt and seed "
    "twice, at 1024x1024 (512x512 draws badly here): by the checkpoint as it is "
    "(left), and without the painter (right). Solving takes seconds to a minute, "
    "and another strength is not solved again." + CHECKPOINT.format(family="SDXL"),
    "Erase by text": "## Erase by text\nThe same prompt and seed twice: by the model as it is (left), and by a clone "
    "from which *Erase Concept* took the robot (right). No file and no training: the membrane is computed from the "
    "model's own weights; another strength is not solved again. *Membrane Report* tells what fired; a prompt without a "
    "robot gives the untouched picture." + SWITCH,
    "Erase by file": "## Erase by file\n*Load Membrane* reads `models/semiperm` and `models/loras`; the two canvas "
    "files of this workflow ship with semiperm. The right picture has the same prompt and seed as the left one, with "
    "the membrane applied." + SWITCH + " A membrane belongs to one base model: make yours with *Erase Concept* and "
    "*Save Membrane*.",
    "Stack and compare": "## Stack and compare\nColumns: before, the robot membrane alone, robot and sketch stacked. "
    "The upper prompt asks for both concepts; the lower one for neither, and its three pictures are equal to the bit. "
    "Further files stack by the input *membranes* of *Load Membrane*." + SWITCH + " The files must be of that model.",
    "Save and reload": "## Save and reload\n*Solve Membranes* computes membranes with everything that can be set; "
    "*Apply Membranes* says how they act, and changes without solving again. *Save Membrane* writes them to "
    "`models/semiperm`, and the file, loaded again, gives the same picture to the bit. From then on you "
    "need this node no more: in any workflow press **R** (refresh the node definitions) and choose the file, whose "
    "name *Save Membrane* shows, in *Load Membrane*." + SWITCH,
    "Train membranes": "## Train membranes\nThe same prompt and seed twice: by the model as it is (left), and through "
    "a membrane that *Train Membranes* trained by latent anchoring, from the closed form on (right). While it trains, "
    "the node shows a picture as the model makes it by itself and through the membrane; the course of the losses is "
    "saved, too. Cancelled, it goes on where it was when you queue it again. *Save Membrane* writes the result to "
    "`models/semiperm`, so that *Load Membrane* takes its place from then on." + SWITCH + " Set width and height of "
    "*Train Membranes* to the model's own size as well, and give it some hundred steps.",
    "Away from a picture": "## Away from a picture\nLeft the reference, a mascot. Middle: a prompt that "
    "means the mascot without naming it. Right: the same prompt and seed, pushed away from the reference by *Negative "
    "Token Merging*: another object, in the style and before the background that were asked for. The words at "
    "*reference* say what the reference shows. *Load Image* may take the place of the sampled reference."
    + SWITCH
    + " Begin with *Negative Token Merging*, whose settings are the paper's.",
    "A batch apart": "## A batch apart\nFour pictures of one prompt: above by the model as it is, "
    "below with the same seeds and *Negative Token Merging* without an image: each picture is pushed away from what it "
    "has in common with the others. No extra picture is denoised for it."
    + SWITCH
    + " Begin with *Negative Token Merging*, whose settings are the paper's.",
    "Safe guidance": "## Safe guidance\nThe same prompt and seed twice: by the model as it is (left), and steered away "
    "from a category of harm by *Safe Guidance* (right): the canvas's hazard, a mark in a corner. The right latent "
    "goes through *Guidance Report* to its decoder, so that no picture is decoded of a run without protection. "
    "cfg must be above 1." + SWITCH.replace("and concept", "and category"),
    "Safe guidance, flow": "## Safe guidance, on a flow model\nThe same prompt and seed twice, by a model of Stable "
    "Diffusion 3's architecture: as it is (left), and steered away from a hazard mark by *Safe Guidance (advanced)* "
    "with words of its own (right); this model needs the strongest preset, *max*. Thresholds mean the same as on older "
    "models. The right latent goes through *Guidance Report* to its decoder, so that no picture is decoded of a run "
    "without protection. cfg must be above 1." + SWITCH.replace("and concept", "and words"),
    "Negative guidance, turbo": "## A negative prompt in four steps\nThe same prompt and seed three times, by a model "
    "that draws in four steps without guidance (cfg 1), where a negative prompt does nothing: as it is (left), pushed "
    "away from fire by *Normalized Attention Guidance* (middle), and with what its words have of fire taken out by "
    "*Value Decomposer* (right). On this model of four small blocks the first hardly shows and the second fades the "
    "fire; larger models have more attention to push." + SWITCH.replace("and concept", "and words"),
    "Sign": "## Sign\nThe same prompt and seed twice: by the model as it is (left), and with the signs of "
    "its noise set by your key (middle): another picture of the same quality. *Detect Watermark* finds the mark again "
    "and shows where (right); *Save With Provenance* writes down what was found, beside the workflow." + KEYS,
    "Sign with hires fix": "## Sign, with hires fix\nBoth passes have the MODEL of *Watermark Model*: the "
    "second one adds noise to the enlarged picture, and signs it. The last pass's mark is what *Detect "
    "Watermark* finds (middle: the first pass; right: where the mark is). If a later pass had the unsigned "
    "model, *Watermark Model* would refuse to run." + KEYS,
    "Sign an inpainting": "## Sign an inpainting\nA picture without a mark (left) gets a new right side "
    "(middle), whose noise is signed. *Detect Watermark* is given the same mask, and counts nothing else "
    "(right). For a photo of your own put *Load Image* and *VAE Encode* before *Set Latent Noise Mask*." + KEYS,
    "Detect": "## Detect\n*SamplerCustomAdvanced* draws one picture from *Watermark Noise* and one from "
    "*RandomNoise*; *Detect Watermark* tells them apart. p is the chance that a picture without a mark looks so "
    "marked. For pictures of your own put *Load Image* before *Detect Watermark*." + KEYS,
    "Attack and detect": "## Attack and detect\n*Attack Suite* does to a signed picture what happens to "
    "pictures on their way, one attack a line; *Detect Watermark* tells what of the mark is left, and where: green "
    "agrees with the mark, red does not. Turned pictures need *search*, which takes longer." + KEYS,
}


def widgets(info: dict) -> dict[str, dict]:
    """{name: options} of the inputs that a node of this object_info shows as widgets, in their order."""
    found = {}
    for kind, names in info["input_order"].items():
        for name in names if kind != "hidden" else ():
            spec = info["input"][kind][name]
            options = spec[1] if len(spec) > 1 else {}
            if (isinstance(spec[0], list) or spec[0] in WIDGETS) and not options.get("forceInput"):
                found[name] = options
    return found


def ui_node(key: str, node: dict, info: dict) -> dict:
    """One litegraph node without position and links."""
    shown, sockets, fields, values = widgets(info), [], [], []
    for kind in ("required", "optional"):
        for name, spec in info["input"].get(kind, {}).items():
            type_ = "COMBO" if isinstance(spec[0], list) else spec[0]
            if name in shown:
                fields.append({"name": name, "type": type_, "widget": {"name": name}, "link": None})
            else:
                optional = {"shape": 7} if kind == "optional" else {}  # a hollow socket
                sockets.append({"name": name, "type": type_, "link": None} | optional)
    for name, options in shown.items():
        value = node["inputs"].get(name)
        if isinstance(value, list):  # wired: the field below the wire shows any choice
            value = options.get("default") or (options.get("options") or [""])[0]
        values.append(value)
        values += ["fixed"] if options.get("control_after_generate") else []
    named = zip(info["output_name"], info["output"], strict=True)
    outputs = [{"name": name, "type": type_, "links": []} for name, type_ in named]
    rows = max(len(sockets), len(outputs)) * 20 + len(values) * 26 + 16
    width, height = SIZES.get(node["class_type"], (290, 0))
    width = max(width, 8 * len(node["_meta"]["title"]) + 70)
    ours = node["class_type"].startswith("Semiperm")
    return {
        "id": int(key),
        "type": node["class_type"],
        "title": node["_meta"]["title"],
        "size": [width, max(rows, height)],
        "flags": {},
        "mode": 0,
        "inputs": sockets + fields,
        "outputs": outputs,
        "properties": {"cnr_id": "semiperm" if ours else "comfy-core", "Node name for S&R": node["class_type"]},
        "widgets_values": values,
    }


def stage_of(node: dict) -> str:
    """The stage that names this node's title, else its class."""
    names = node["_meta"]["title"], node["class_type"]
    return next(stage for name in names for stage, members in STAGES.items() if name in members)


def place(api: dict, nodes: dict[str, dict], left: float) -> list[dict]:
    """Give every node its position and return the groups: stages and, within them, longest paths as columns."""
    groups = []
    for index, stage in enumerate(STAGES):
        inside = [key for key in api if stage_of(api[key]) == stage]
        columns: dict[int, list[str]] = {}
        depth: dict[str, int] = {}
        for key in inside:  # api files list a node after those it needs
            sources = [v[0] for v in api[key]["inputs"].values() if isinstance(v, list) and v[0] in depth]
            depth[key] = 0 if index == 0 else 1 + max((depth[s] for s in sources), default=-1)
            columns.setdefault(depth[key], []).append(key)
        start, bottom = left, 0
        for _, keys in sorted(columns.items()):
            top = 0
            for key in keys:
                level = [
                    nodes[v[0]]["pos"][1] for v in api[key]["inputs"].values() if isinstance(v, list) and v[0] in depth
                ]
                top = max(top, min(level, default=0))  # beside its source
                nodes[key]["pos"] = [left, top]
                top += nodes[key]["size"][1] + TITLE_BAR + GAP // 2 + TALLER
            left += max(nodes[key]["size"][0] for key in keys) + GAP
            bottom = max(bottom, top)
        if inside:
            box = [start - 20, -TITLE_BAR - 50, left - start - GAP + 40, bottom + TITLE_BAR + 30]
            groups.append({"id": index + 1, "title": stage, "bounding": box, "color": COLORS[index], "flags": {}})
            left += 20
    return groups


def build(name: str, api: dict, object_info: dict) -> dict:
    """The UI graph (litegraph, version 0.4) of an API-format workflow."""
    nodes = {key: ui_node(key, node, object_info[node["class_type"]]) for key, node in api.items()}
    note_id, links = max(map(int, api)) + 1, []
    note = {"id": note_id, "type": "MarkdownNote", "pos": [0, 0], "size": [380, 420], "flags": {}, "mode": 0}
    note |= {"inputs": [], "outputs": [], "properties": {}, "widgets_values": [NOTES[name]], "color": "#432"}
    for key, node in api.items():
        slots = {slot["name"]: (i, slot) for i, slot in enumerate(nodes[key]["inputs"])}
        for input_name, value in node["inputs"].items():
            if isinstance(value, list):
                index, slot = slots[input_name]
                source = nodes[value[0]]["outputs"][value[1]]
                slot["link"] = len(links) + 1
                source["links"].append(slot["link"])
                links.append([slot["link"], int(value[0]), value[1], int(key), index, source["type"]])
    groups = place(api, nodes, left=note["size"][0] + GAP + 40)
    ordered = [note, *nodes.values()]
    for order, node in enumerate(ordered):
        node["order"] = order
    graph = {"last_node_id": note_id, "last_link_id": len(links), "nodes": ordered, "links": links, "groups": groups}
    return graph | {"config": {}, "extra": {}, "version": 0.4}


def lacks_weights(api: dict) -> bool:
    """Whether a workflow's model does not ship, so that it cannot be run here."""
    return any(node["class_type"] == "CheckpointLoaderSimple" for node in api.values())


def get(url: str, body: dict | None = None) -> bytes:
    with urllib.request.urlopen(url, json.dumps(body).encode() if body else None, timeout=60) as answer:
        return answer.read()


def render(server: str, api: dict, path: Path) -> None:
    """Run the workflow and write what its last Save Image saves as the thumbnail: a batch in rows of four."""
    from PIL import Image

    job = json.loads(get(f"{server}/prompt", {"prompt": api}))["prompt_id"]
    while not (history := json.loads(get(f"{server}/history/{job}"))):
        time.sleep(0.5)
    savers = [key for key in api if api[key]["class_type"] == "SaveImage" and key in history[job]["outputs"]]
    if not savers:
        raise SystemExit(f"{path.stem}: the run saved no picture: {history[job]['status']}")
    saved = history[job]["outputs"][savers[-1]]["images"]
    files = [get(f"{server}/view?{urllib.parse.urlencode(one)}") for one in saved]
    panels = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    (width, height), gap, columns = panels[0].size, 8, min(4, len(panels))
    rows = -(-len(panels) // columns)
    image = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, panel in enumerate(panels):
        image.paste(panel, (index % columns * (width + gap), index // columns * (height + gap)))
    size = (THUMBNAIL_WIDTH, round(image.height * THUMBNAIL_WIDTH / image.width))
    image.resize(size, Image.Resampling.LANCZOS).save(path, quality=90)


def draw(graph: dict, path: Path) -> None:
    """A drawing of the graph as the thumbnail, for a workflow that cannot run here."""
    from PIL import Image, ImageDraw, ImageFont

    boxes = [group["bounding"] for group in graph["groups"]]
    left, top = (min(box[i] for box in boxes) for i in (0, 1))
    right, bottom = (max(box[i] + box[i + 2] for box in boxes) for i in (0, 1))
    scale, margin = 2 * THUMBNAIL_WIDTH / (right - left), 8  # drawn at twice the size
    image = Image.new("RGB", (2 * THUMBNAIL_WIDTH, round((bottom - top) * scale) + 2 * margin), "#202020")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)

    def at(x: float, y: float) -> tuple[float, float]:
        return (x - left) * scale, (y - top) * scale + margin

    for group in graph["groups"]:
        x, y, w, h = group["bounding"]
        pen.rectangle((*at(x, y), *at(x + w, y + h)), outline=group["color"], width=3)
        pen.text(at(x + 12, y + 8), group["title"], fill=group["color"], font=font)
    nodes = {node["id"]: node for node in graph["nodes"]}
    for _, source, out, target, into, _ in graph["links"]:
        a, b = nodes[source], nodes[target]
        start, end = (
            (a["pos"][0] + a["size"][0], a["pos"][1] + 20 * out + 14),
            (b["pos"][0], b["pos"][1] + 20 * into + 14),
        )
        pen.line((*at(*start), *at(*end)), fill="#8a8a8a", width=2)
    for node in nodes.values():
        (x, y), (w, h) = node["pos"], node["size"]
        if node["type"] != "MarkdownNote":
            ours = node["type"].startswith("Semiperm")
            pen.rectangle((*at(x, y - TITLE_BAR), *at(x + w, y + h)), fill="#4a3a55" if ours else "#353535")
            pen.text(at(x + 10, y - TITLE_BAR + 4), node["title"], fill="white", font=font)
    image.resize((THUMBNAIL_WIDTH, image.height // 2), Image.Resampling.LANCZOS).save(path, quality=90)


def english(object_info: dict) -> dict:
    """nodeDefs.json of our nodes: what the page shows of them, for translators to begin with."""
    found = {}
    for name, info in object_info.items():
        if not name.startswith("Semiperm"):
            continue
        inputs = {
            key: {"name": spec[1].get("display_name") or key, "tooltip": spec[1]["tooltip"]}
            for kind in ("required", "optional")
            for key, spec in info["input"].get(kind, {}).items()
        }
        named = zip(info["output_name"], info["output_tooltips"], strict=True)
        outputs = {str(i): {"name": name, "tooltip": text} for i, (name, text) in enumerate(named)}
        about = {"display_name": info["display_name"], "description": info["description"]}
        found[name] = about | {"inputs": inputs, "outputs": outputs}
    return found


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(server: str, pictures: bool, names: list[str]) -> None:
    object_info = json.loads(get(f"{server}/object_info"))
    write(HERE.parent / "locales" / "en" / "nodeDefs.json", english(object_info))
    for name, parts in BLUEPRINTS.items():
        nodes = {key: ui_node(key, node, object_info[node["class_type"]]) for key, node in parts.api.items()}
        write(HERE.parent / "subgraphs" / f"{name}.json", blueprint(name, parts, nodes))
    for source in sorted((HERE / "api").glob("*.json")):
        if names and source.stem not in names:
            continue
        api = json.loads(source.read_text(encoding="utf-8"))
        graph = build(source.stem, api, object_info)
        write(HERE / source.name, graph)
        if lacks_weights(api):
            draw(graph, HERE / f"{source.stem}.jpg")
        elif pictures:
            render(server, api, HERE / f"{source.stem}.jpg")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    chosen = [name for name in sys.argv[2:] if not name.startswith("--")]
    main(sys.argv[1].rstrip("/"), "--no-pictures" not in sys.argv, chosen)
