// Shows what a node reports as text (ui.PreviewText) in the node itself: the frontend does so for its own nodes only.
import { app } from "/scripts/app.js";

const NODES = [
  "SemipermDetectWatermark",
  "SemipermKeyring",
  "SemipermMembraneReport",
  "SemipermSaveMembrane",
  "SemipermSaveWithProvenance",
  "SemipermTokenMergingReport",
];
const LINE = 14; // pixels
const TALLEST = 240; // longer ones scroll
const STYLE = {
  boxSizing: "border-box",
  margin: "0",
  padding: "6px",
  width: "0", // with the minimum: as wide as the node is, however long a line is
  minWidth: "100%",
  overflow: "auto",
  whiteSpace: "pre", // a table keeps its columns
  font: `11px/${LINE}px monospace`,
  color: "var(--input-text)",
  background: "var(--comfy-input-bg)",
  borderRadius: "4px",
  userSelect: "text",
};

// A plain element, not a text field: with Vue nodes the frontend draws fields anew, and those wrap and grow.
function textOf(node) {
  const known = node.widgets?.find((widget) => widget.name === "shown");
  if (known) return known;
  const element = document.createElement("pre");
  Object.assign(element.style, STYLE);
  element.addEventListener("pointerdown", (event) => event.stopPropagation()); // selects text, does not drag the node
  const height = () => Math.min(LINE * element.textContent.split("\n").length + 24, TALLEST);
  return node.addDOMWidget("shown", "semiperm_text", element, {
    getValue: () => element.textContent,
    setValue: (text) => {
      element.textContent = text;
      element.style.height = `${height()}px`;
    },
    getMinHeight: height,
    getMaxHeight: height,
    hideOnZoom: false,
    serialize: false, // neither in the workflow nor in the prompt
  });
}

app.registerExtension({
  name: "semiperm.showText",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.includes(nodeData.name)) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (message) {
      onExecuted?.apply(this, arguments);
      if (!message?.text) return;
      const widget = textOf(this);
      const before = widget.options.getMinHeight();
      const isNew = widget.value === "";
      widget.serialize = false;
      widget.value = message.text.join("\n");
      if (!isNew && widget.options.getMinHeight() === before) return; // the user's size stays while the text is as long
      const [width, height] = this.computeSize();
      const picture = message.images && !this.imgs ? 260 : 0; // it arrives after the text
      this.setSize([Math.max(this.size[0], width, 400), Math.max(this.size[1], height + picture)]);
    };
  },
});
