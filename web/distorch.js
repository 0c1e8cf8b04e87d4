// DisTorch in ComfyUI's browser: a split in each of its nodes, and a panel in the side bar.

import { app } from "../../scripts/app.js";
import { dress } from "./dom.js";
import { attach, followDialogs, refresh } from "./node_split.js";
import { Panel } from "./panel.js";
import { say, speak } from "./words.js";

app.registerExtension({
  name: "DisTorch",

  setup() {
    speak(app.extensionManager?.setting?.get("Comfy.Locale") ?? navigator.language);
    dress();
    followDialogs();
    const panel = new Panel();
    app.extensionManager?.registerSidebarTab?.({
      id: "distorch",
      icon: "pi pi-chart-bar",
      title: "DisTorch",
      tooltip: say("panel"),
      type: "custom",
      render: (element) => panel.open(element),
      destroy: () => panel.close(),
    });
  },

  nodeCreated: attach,
  loadedGraphNode: refresh,
});
