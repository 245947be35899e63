// Shows what a node reports as text (ui.PreviewText) in the node itself: the frontend does so for its own nodes only.
import { app } from "/scripts/app.js";
import { ComfyWidgets } from "/scripts/widgets.js";

const NODES = [
  "SemipermDetectWatermark",
  "SemipermKeyring",
  "SemipermMembraneReport",
  "SemipermSaveMembrane",
  "SemipermSaveWithProvenance",
  "SemipermTokenMergingReport",
];

app.registerExtension({
  name: "semiperm.showText",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.includes(nodeData.name)) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (message) {
      onExecuted?.apply(this, arguments);
      if (!message?.text) return;
      let widget = this.widgets?.find((w) => w.name === "shown");
      if (!widget) {
        widget = ComfyWidgets.STRING(this, "shown", ["STRING", { multiline: true }], app).widget;
        widget.inputEl.readOnly = true;
        widget.inputEl.style.whiteSpace = "pre"; // the table keeps its columns
        widget.inputEl.style.fontFamily = "monospace";
        widget.serialize = false; // neither in the workflow
        widget.options.serialize = false; // nor in the prompt
      }
      widget.value = message.text.join("\n");
      const tall = Math.min(26 + 13 * widget.value.split("\n").length, 240); // longer ones scroll
      if (widget.options.getMinHeight?.() === tall) return; // the user's size stays while the text is as long
      widget.options.getMinHeight = () => tall;
      const [width, height] = this.computeSize();
      const picture = message.images && !this.imgs ? 260 : 0; // it arrives after the text
      this.setSize([Math.max(this.size[0], width, 400), Math.max(this.size[1], height + picture)]);
    };
  },
});
