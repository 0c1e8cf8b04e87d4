// The side panel: memory of each device, the links, and what each distributed model does now.

import { api } from "../../scripts/api.js";
import { bar, make } from "./dom.js";
import { bytes, percent, say, speed } from "./words.js";

const EVERY_MS = 1000;

/** A panel that asks once a second while it can be seen. */
export class Panel {
  /** Show it in an element of the side bar. */
  open(parent) {
    this.close();
    this.body = make("div", { className: "distorch-panel", tabIndex: 0, role: "region" });
    this.body.setAttribute("aria-label", say("panel"));
    parent.replaceChildren(this.body);
    this.tick(this.body);
  }

  /** Ask no more. */
  close() {
    clearTimeout(this.timer);
    this.body = null;
  }

  async tick(body) {
    if (document.visibilityState === "visible" && body.isConnected) {
      const sections = await status();
      if (body !== this.body) return;
      body.replaceChildren(...sections);
    }
    this.timer = setTimeout(() => this.tick(body), EVERY_MS);
  }
}

async function status() {
  try {
    const response = await api.fetchApi("/distorch/status");
    const { devices, links, models } = await response.json();
    return [memory(devices), linked(links), ...running(models)];
  } catch {
    return [make("p", { role: "status" }, say("away"))];
  }
}

function section(title, ...content) {
  return make("section", {}, make("h3", {}, title), ...content);
}

function memory(devices) {
  const rows = devices.map(({ device, kind, capacity_bytes: all, free_bytes: free }) => {
    const used = all - free;
    const text = say("usedOf", { used: bytes(used), all: bytes(all) });
    return row(device, kind, text, bar([["distorch-ours", all ? used / all : 0]]));
  });
  return section(say("memory"), make("ul", { className: "distorch-rows" }, ...rows));
}

function row(device, kind, text, drawn) {
  const name = make("span", { className: "distorch-device" }, device);
  const size = make("span", { className: "distorch-size" }, text);
  const label = make("div", { className: "distorch-label" }, name, size);
  return make("li", { className: `distorch-row distorch-${kind}` }, label, drawn);
}

function linked(links) {
  if (!links.length) return section(say("links"), make("p", {}, say("noLinks")));
  const facts = links.map((link) => [
    `${link.source} → ${link.target}`,
    speed(link.bytes_per_second),
  ]);
  return section(say("links"), table(facts));
}

function running(models) {
  if (!models.length) return [section(say("models"), make("p", {}, say("noModels")))];
  return models.map((model) => {
    const rows = model.plan.map(({ device, kind, bytes: count, share, num_blocks: blocks }) => {
      const text = `${bytes(count)} · ${say("blocks", { count: blocks })}`;
      return row(device, kind, text, bar([["distorch-ours", share]]));
    });
    return section(
      model.name,
      make("p", {}, make("code", {}, model.allocation)),
      make("p", {}, `${bytes(model.model_bytes)}, ${say("computes", { device: model.compute })}`),
      make("ul", { className: "distorch-rows" }, ...rows),
      table([
        [say("ring"), bytes(model.ring_bytes)],
        [say("steps"), String(model.num_steps)],
        [say("streamed"), bytes(model.streamed_bytes)],
        [say("speed"), speed(model.link_bytes_per_second)],
        [say("stall"), percent(model.stall_share)],
        [say("efficiency"), model.efficiency.toFixed(2)],
      ]),
    );
  });
}

function table(facts) {
  const rows = facts.map(([name, value]) =>
    make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, value)),
  );
  return make("table", {}, make("tbody", {}, ...rows));
}
