// Words in two languages, and numbers as people read them.

const WORDS = {
  en: {
    split: "Where the weights rest",
    auto: "decided from what is free, when the model is loaded",
    linked: "comes from another node",
    about: "about {size}, the size of the file",
    free: "{size} free",
    rest: "the rest",
    ofModel: "{share} of the model",
    upTo: "up to {size}",
    tooMuch: "more than is free",
    tryThis: "try: {line}",
    away: "the server does not answer",
    panel: "DisTorch: memory, links and stalls",
    memory: "Memory",
    links: "Links",
    models: "Models",
    noLinks: "No link has been measured: run distorch probe.",
    noModels: "No distributed model is loaded.",
    usedOf: "{used} of {all} used",
    computes: "computes on {device}",
    ring: "ring",
    steps: "steps",
    streamed: "streamed",
    speed: "while streaming",
    stall: "waited",
    efficiency: "E",
    blocks: "{count} blocks",
  },
  zh: {
    split: "权重存放位置",
    auto: "加载模型时按可用内存决定",
    linked: "由其他节点给出",
    about: "约 {size}（文件大小）",
    free: "可用 {size}",
    rest: "其余部分",
    ofModel: "模型的 {share}",
    upTo: "最多 {size}",
    tooMuch: "超过可用空间",
    tryThis: "可以试试：{line}",
    away: "服务器没有响应",
    panel: "DisTorch：内存、链路与等待",
    memory: "内存",
    links: "链路",
    models: "模型",
    noLinks: "尚未测量任何链路：请运行 distorch probe。",
    noModels: "没有已加载的分布式模型。",
    usedOf: "已用 {used} / {all}",
    computes: "在 {device} 上计算",
    ring: "环形缓冲",
    steps: "步数",
    streamed: "已流送",
    speed: "流送速度",
    stall: "等待占比",
    efficiency: "E",
    blocks: "{count} 块",
  },
};

let language = "en";

/** Choose the language from a locale such as "zh-CN"; English where we have no other. */
export function speak(locale) {
  language = String(locale ?? "").toLowerCase().startsWith("zh") ? "zh" : "en";
}

/** A text by its name, with {places} filled in. */
export function say(name, places = {}) {
  return WORDS[language][name].replace(/\{(\w+)\}/g, (_, place) => places[place] ?? "");
}

/** Bytes in the unit that shows them best: 4.00 GiB, 64.0 MiB, 12 B. */
export function bytes(count) {
  if (count >= 2 ** 40) return `${(count / 2 ** 40).toFixed(2)} TiB`;
  if (count >= 2 ** 30) return `${(count / 2 ** 30).toFixed(2)} GiB`;
  if (count >= 2 ** 20 / 10) return `${(count / 2 ** 20).toFixed(1)} MiB`;
  return `${Math.round(count)} B`;
}

/** A share from 0 to 1 as percent. */
export function percent(share) {
  const value = share * 100;
  return `${value > 0 && value < 10 ? value.toFixed(1) : Math.round(value)} %`;
}

/** A speed as links are sold: 24.0 GB/s, in powers of ten. */
export function speed(bytesPerSecond) {
  return `${(bytesPerSecond / 1e9).toFixed(bytesPerSecond < 1e10 ? 2 : 1)} GB/s`;
}
