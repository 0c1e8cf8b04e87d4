// Draws an answer of /distorch/preview: a bar for each device, or the line with a caret under the
// place that cannot be read.

import { bar, make } from "./dom.js";
import { bytes, percent, say } from "./words.js";

/** The elements for one answer, under a title where a node has several splits. */
export function drawSplit(answer, title) {
  const elements = [headOf(answer, title)];
  if (answer.entries.length) {
    elements.push(make("ul", { className: "distorch-rows" }, ...answer.entries.map(rowOf)));
  }
  if (answer.error) elements.push(drawError(answer.error));
  return elements;
}

/** A parser's error: its line, a caret under the place, what is wrong, and a line that reads. */
export function drawError({ text, position, length, message, hint }) {
  const lines = [];
  if (position !== null && position !== undefined) {
    const letters = Array.from(text); // the server counts characters, not UTF-16 units
    const before = letters.slice(0, position).join("");
    const carets = "^".repeat(Math.max(1, length));
    const pad = make("span", { className: "distorch-pad" }, before); // as wide as what it repeats
    const pointer = make("span", { className: "distorch-caret" }, carets);
    const under = make("div", { aria: { hidden: "true" } }, pad, pointer);
    lines.push(make("div", { className: "distorch-line" }, make("div", {}, text || " "), under));
  }
  lines.push(make("div", { className: "distorch-message" }, message));
  if (hint) lines.push(make("div", { className: "distorch-hint" }, say("tryThis", { line: hint })));
  return make("div", { className: "distorch-error", role: "status" }, ...lines);
}

/** One line of plain text in place of a split. */
export function drawNote(text) {
  return [make("div", { className: "distorch-head" }, text)];
}

function headOf({ canonical, model_bytes: size, entries, error }, title) {
  const isOpen = canonical === "auto" && !entries.length;
  const line = isOpen ? `auto: ${say("auto")}` : canonical;
  const parts = [
    title && make("strong", {}, title),
    line && line !== error?.text && make("code", {}, line), // else it stands over the caret
    size && make("span", {}, say("about", { size: bytes(size) })),
  ];
  return make("div", { className: "distorch-head" }, ...parts.filter(Boolean));
}

function rowOf(entry) {
  const isOver = entry.free_bytes !== null && (entry.bytes ?? 0) > entry.free_bytes;
  const free = entry.free_bytes === null ? "" : say("free", { size: bytes(entry.free_bytes) });
  const size = make("span", { className: "distorch-size" }, sizeOf(entry));
  const room = make("span", { className: "distorch-free" }, isOver ? say("tooMuch") : free);
  const name = make("span", { className: "distorch-device" }, entry.device);
  const line = make("div", { className: "distorch-label" }, name, size, room);
  const row = make("li", { className: `distorch-row distorch-${entry.kind}` }, line, barOf(entry));
  row.classList.toggle("distorch-over", isOver);
  return row;
}

function sizeOf({ bytes: count, share }) {
  if (count !== null && share !== null) return `${bytes(count)} · ${percent(share)}`;
  if (count !== null) return say("upTo", { size: bytes(count) });
  return share === null ? say("rest") : say("ofModel", { share: percent(share) });
}

/** The device's memory with what others use and what the model takes; else the model itself. */
function barOf({ bytes: count, share, capacity_bytes: all, free_bytes: free }) {
  if (count === null || !all) return bar([["distorch-ours", share ?? 0]]);
  return bar([
    ["distorch-others", (all - free) / all],
    ["distorch-ours", count / all],
  ]);
}
