// Which inputs of a node say where a model rests, and what they say now.

const LINES = /^(.*?)(expert_mode_allocations|allocation)$/;
const MODEL_FILE = /\.(safetensors|sft|gguf|ckpt|pt|pth|bin)$/i;
const MODEL_TYPES = new Set(["MODEL", "CLIP", "VAE", "CONTROL_NET", "CLIP_VISION"]);
const MAX_HOPS = 16;

/** Whether a class of nodes is ours: by its key, or by its category. */
export function isOurs(key, category) {
  return /(MultiGPU|DisTorch2?)$|^Distorch/.test(key) || /^(multigpu|distorch)\b/i.test(category);
}

/** The splits of a node, each as the widgets that decide it: one, or those of UNet and CLIP. */
export function splitsOf(node) {
  const named = (name) => node.widgets?.find((widget) => widget.name === name);
  return (node.widgets ?? []).flatMap((line) => {
    const [, prefix] = LINES.exec(line.name ?? "") ?? [];
    if (prefix === undefined) return [];
    const first = (...names) => names.map((name) => named(prefix + name)).find(Boolean);
    return [
      {
        title: prefix.replaceAll("_", " ").trim(), // "unet" and "clip" where a node has both
        widgets: {
          line,
          compute: first("compute_device", "device", "compute"),
          gb: first("virtual_vram_gb"),
          donor: first("donor_device"),
          others: first("use_other_vram"),
        },
      },
    ];
  });
}

/** What to ask the server about a split, or null where its line comes over a link. */
export function questionOf(node, { title, widgets }, typed = new Map()) {
  const value = (widget) => typed.get(widget) ?? widget?.value;
  if (isLinked(node, widgets.line)) return null;
  const question = {
    text: String(value(widgets.line) ?? ""),
    compute_device: device(value(widgets.compute)),
    files: title ? [] : filesOf(node), // a checkpoint's parts have no size of their own
  };
  if (widgets.gb) question.virtual_vram_gb = Number(value(widgets.gb));
  if (widgets.others) question.use_other_vram = Boolean(value(widgets.others));
  if (widgets.donor) question.donor_device = device(value(widgets.donor));
  return question;
}

function device(value) {
  return !value || value === "auto" || value === "default" ? "" : String(value);
}

function isLinked(node, widget) {
  const input = node.inputs?.find((slot) => slot.widget?.name === widget.name);
  return input?.link !== null && input?.link !== undefined;
}

/** Whether a slot takes a model of any kind; some take several kinds. */
function isModel({ type }) {
  return String(type).split(",").some((kind) => MODEL_TYPES.has(kind));
}

/** The model files that a node loads, or that what it is given came from. */
function filesOf(node) {
  for (let hop = 0; node && hop < MAX_HOPS; hop += 1) {
    const files = (node.widgets ?? [])
      .filter(({ name, value }) => !/lora/i.test(name) && MODEL_FILE.test(String(value ?? "")))
      .map(({ value }) => String(value));
    if (files.length) return files;
    const slot = node.inputs?.findIndex(isModel) ?? -1;
    node = slot < 0 ? null : node.getInputNode(slot);
  }
  return [];
}
