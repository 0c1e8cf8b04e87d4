// The split in a node: a widget below the others, drawn again as its inputs change.

import { api } from "../../scripts/api.js";
import { make } from "./dom.js";
import { isOurs, questionOf, splitsOf } from "./inputs.js";
import { drawError, drawNote, drawSplit } from "./split.js";
import { say } from "./words.js";

const PAUSE_MS = 150; // a typist's: the server is asked when the keys rest
const MARGIN = 6;
const LEAST_HEIGHT = 24;
const WIDGET = "distorch_split";

let touched = null; // the widget that a click opened a dialog for

/** Give a node of ours its splits; other nodes are left alone. */
export function attach(node) {
  const { nodeData } = node.constructor;
  if (!isOurs(node.comfyClass ?? "", nodeData?.category ?? "")) return;
  for (const split of splitsOf(node)) {
    const view = new SplitView(node, split);
    (node.distorchViews ??= []).push(view);
    view.refresh();
  }
  const { onConnectionsChange } = node;
  node.onConnectionsChange = function (...given) {
    refresh(node); // the size of what is given comes over a link
    return onConnectionsChange?.apply(this, given);
  };
}

/** Draw all splits of a node again, as after a workflow was opened. */
export function refresh(node) {
  for (const view of node.distorchViews ?? []) view.refresh();
}

/** Follow what is typed into the canvas's own dialog, before it is confirmed. */
export function followDialogs() {
  document.addEventListener("pointerdown", forget, { capture: true });
  document.addEventListener("input", ({ target }) => {
    const dialog = target.closest?.(".graphdialog");
    if (!dialog || !touched) return;
    const { view, widget } = touched;
    view.refresh(new Map([[widget, target.value]]));
    if (dialog.distorchFollowed) return;
    dialog.distorchFollowed = true;
    const observer = new MutationObserver(() => {
      if (dialog.isConnected) return;
      observer.disconnect();
      view.refresh();
    });
    observer.observe(dialog.parentNode, { childList: true });
  });
}

/** A dialog belongs to the click that opened it; the next click may be another widget's. */
function forget({ target }) {
  if (!target.closest?.(".graphdialog")) touched = null;
}

class SplitView {
  constructor(node, split) {
    this.node = node;
    this.split = split;
    this.turn = 0;
    this.height = LEAST_HEIGHT;
    this.content = make("div", { className: "distorch-content" });
    this.element = make(
      "div",
      { className: "distorch-split", role: "group", aria: { label: labelOf(split) } },
      this.content,
    );
    this.addWidget();
    for (const widget of [...Object.values(split.widgets), ...files(node)]) {
      if (widget) this.follow(widget);
    }
  }

  addWidget() {
    const height = () => this.height + 2 * MARGIN;
    const name = WIDGET + (this.split.title && `_${this.split.title}`);
    const widget = this.node.addDOMWidget(name, "distorch_split", this.element, {
      serialize: false, // not an input of the node
      hideOnZoom: false,
      margin: MARGIN,
      getMinHeight: height,
      getMaxHeight: height,
      getValue: () => "",
      setValue: () => {},
    });
    widget.serialize = false; // nor a value of the saved workflow
    new ResizeObserver(() => this.fit()).observe(this.content);
  }

  /** Draw again when a widget's value changes, and know it when a dialog is opened for it. */
  follow(widget) {
    const view = this;
    const { callback, onPointerDown } = widget;
    widget.callback = function (...given) {
      const result = callback?.apply(this, given);
      view.refresh();
      return result;
    };
    widget.onPointerDown = function (...given) {
      touched = { view, widget };
      return onPointerDown?.apply(this, given);
    };
  }

  /** Ask for the split of what the widgets say, or of what is `typed` for them by now. */
  refresh(typed) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.ask(typed), PAUSE_MS);
  }

  async ask(typed) {
    const turn = (this.turn += 1);
    const question = questionOf(this.node, this.split, typed);
    const { title } = this.split;
    const elements = question ? await answerTo(question, title) : drawNote(say("linked"));
    if (turn === this.turn) this.content.replaceChildren(...elements);
  }

  /** Let the node be as high as its split needs; one that the user made higher stays so. */
  fit() {
    const height = this.content.offsetHeight;
    if (!height || Math.abs(height - this.height) < 1) return;
    const before = this.node.computeSize()[1];
    const isSnug = Math.abs(this.node.size[1] - before) < 2;
    this.height = height;
    const least = this.node.computeSize()[1];
    const wanted = isSnug ? least : Math.max(least, this.node.size[1]);
    this.node.setSize([this.node.size[0], wanted]);
    this.node.setDirtyCanvas(true, true);
  }
}

function labelOf({ title }) {
  return title ? `${say("split")}: ${title}` : say("split");
}

function files(node) {
  return (node.widgets ?? []).filter(({ type, name }) => type === "combo" && /name/.test(name));
}

async function answerTo(question, title) {
  try {
    const response = await api.fetchApi("/distorch/preview", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(question),
    });
    const answer = await response.json();
    return response.ok ? drawSplit(answer, title) : [drawError(answer.error)];
  } catch {
    return drawNote(say("away"));
  }
}
