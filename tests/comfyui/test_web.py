"""The pack in a browser: headless Chromium, and ComfyUI's real front end.

Devices are those of any machine, ``cpu`` and ``disk``; sizes are those of the tests' tiny models.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.comfyui.graphs import node, sampled
from tests.comfyui.server import Refused, Server

pytestmark = pytest.mark.slow

LOADER = "UNETLoaderDisTorch2MultiGPU"
LINE = "expert_mode_allocations"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")

_READY = "window.app?.graph && window.app.extensionManager && document.querySelector('canvas')"
_ADD = """([type, values]) => {
    app.graph.clear();
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    node.pos = [0, 0];
    for (const [name, value] of Object.entries(values)) {
        const widget = node.widgets.find((widget) => widget.name === name);
        widget.value = value;
        widget.callback?.(value);
    }
    Object.assign(app.canvas.ds, { scale: 1, offset: [450, 150] });
    app.canvas.setDirty(true, true);
}"""
_PLACE = """(name) => {
    const [node] = app.graph.nodes;
    const widget = node.widgets.find((widget) => widget.name === name);
    const { left, top } = app.canvas.canvas.getBoundingClientRect();
    const [x, y] = app.canvas.ds.offset;
    return [left + x + node.size[0] / 2, top + y + widget.y + 10];
}"""
_CARET = """() => {
    const caret = document.querySelector('.distorch-caret').getBoundingClientRect();
    const range = document.createRange();
    const text = document.querySelector('.distorch-line > div').firstChild;
    const box = (from, to) => {
        range.setStart(text, from);
        range.setEnd(text, to);
        return range.getBoundingClientRect();
    };
    const start = text.data.indexOf('gbb');
    const wrong = box(start, start + 3);
    return [caret.left - wrong.left, caret.right - wrong.right, caret.top - wrong.bottom];
}"""


class Browser:
    """A page with ComfyUI open, and what its console said since it was ready."""

    def __init__(self, page: Any, server: Server) -> None:
        self.page = page
        self.server = server
        self.faults: list[str] = []
        page.on("pageerror", lambda error: self.faults.append(str(error)))

    def open(self, **settings: Any) -> None:
        """Open ComfyUI with these settings; a saved one is left as it is."""

        def answer(route: Any) -> None:
            if route.request.method != "GET":
                route.fulfill(json={})
                return
            found = route.fetch().json()
            route.fulfill(json={**found, "Comfy.TutorialCompleted": True, **settings})

        self.page.route("**/api/settings", answer)
        self.page.goto(self.server.url)
        self.page.wait_for_function(_READY, timeout=60_000)
        self.page.wait_for_selector(".distorch-tab-button", timeout=60_000)
        self.page.wait_for_load_state("networkidle")
        self.page.on("console", self._hear)

    def _hear(self, message: Any) -> None:
        """Keep what went wrong; the front end's own questions to sites elsewhere are left alone."""
        source = message.location.get("url") or self.server.url
        if message.type == "error" and source.startswith(self.server.url):
            self.faults.append(f"{message.text} ({source})")

    def add(self, key: str = LOADER, **values: Any) -> None:
        self.page.evaluate(_ADD, [key, {"unet_name": "flux.safetensors", **values}])

    def type_into(self, name: str, text: str) -> None:
        """Open the canvas's dialog of a widget and type, without confirming."""
        self.page.mouse.click(*self.page.evaluate(_PLACE, name))
        self.page.wait_for_selector(".graphdialog input")
        self.page.keyboard.type(text, delay=10)

    def shows(self, *texts: str) -> str:
        """Wait until the first split shows these texts, and return all that it shows."""
        condition = "(texts) => texts.every((text) => document.querySelector('.distorch-split')"
        condition += "?.innerText.includes(text))"
        self.page.wait_for_function(condition, arg=list(texts), timeout=10_000)
        return str(self.page.inner_text(".distorch-split"))

    def devices(self) -> list[str]:
        return list(self.page.locator(".distorch-split .distorch-device").all_inner_texts())


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip has it")
    path = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if path is None:
        pytest.skip("needs Chromium: the system's packages have it")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def browser(server: Server, chromium: Any) -> Iterator[Browser]:
    page = chromium.new_page(viewport={"width": 1280, "height": 800})
    found = Browser(page, server)
    yield found
    page.close()
    assert found.faults == []


def test_a_line_is_drawn_while_it_is_typed(browser: Browser) -> None:
    browser.open()
    browser.add()
    browser.shows("cpu")
    browser.type_into(LINE, "cpu,25%;disk,*")
    browser.shows("cpu,25%;disk,*", "25 %", "75 %", "MiB")
    assert browser.devices() == ["cpu", "disk"]
    assert (
        browser.page.evaluate(f"app.graph.nodes[0].widgets.find((w) => w.name == '{LINE}').value")
        == ""
    )
    browser.page.keyboard.press("Escape")
    browser.shows("100 %")
    assert browser.devices() == ["cpu"]


def test_a_wrong_line_shows_the_parsers_message_and_the_caret_under_the_place(
    browser: Browser,
) -> None:
    browser.open()
    browser.add()
    browser.type_into(LINE, "cpu,2gbb;disk,*")
    shown = browser.shows("^^^", "unknown unit 'gbb': use b, kb, mb, gb or tb", "cpu,2gb;disk,*")
    assert "cpu,2gbb;disk,*" in shown
    left, right, below = browser.page.evaluate(_CARET)
    assert abs(left) < 1
    assert abs(right) < 1
    assert -4 < below < 8
    browser.page.keyboard.press("Backspace")
    browser.page.keyboard.press("Enter")
    browser.type_into(LINE, "cpu,2gb;disk,*")
    browser.page.keyboard.press("Enter")
    browser.shows("cpu,2gb;disk,*", "100 %")
    assert browser.page.locator(".distorch-error").count() == 0


def test_a_split_is_no_input_and_no_value_of_the_workflow(browser: Browser) -> None:
    browser.open()
    browser.add(**{LINE: "cpu,1mb;disk,*"})
    browser.shows("1.0 MiB")
    saved = browser.page.evaluate("app.graph.serialize().nodes[0].widgets_values")
    assert [value for value in saved if value != "cpu"][-2:] == ["cpu,1mb;disk,*", True]
    prompt = browser.page.evaluate("app.graphToPrompt().then((prompt) => prompt.output)")
    (sent,) = prompt.values()
    listed = browser.server.get(f"/object_info/{LOADER}")[LOADER]["input"]
    assert set(sent["inputs"]) == {*listed["required"], *listed["optional"]}


def test_a_saved_workflow_is_drawn_when_it_is_opened(browser: Browser) -> None:
    browser.open()
    browser.add(**{LINE: "cpu,1mb;disk,*"})
    browser.shows("1.0 MiB")
    saved = browser.page.evaluate("JSON.stringify(app.graph.serialize())")
    browser.page.evaluate("app.graph.clear()")
    browser.page.evaluate("(saved) => app.loadGraphData(JSON.parse(saved))", saved)
    browser.page.wait_for_function("app.graph.nodes[0]?.widgets")
    browser.shows("cpu,1mb;disk,*", "1.0 MiB")


def test_only_our_nodes_get_a_split(browser: Browser) -> None:
    browser.open()
    browser.add("UNETLoader")
    browser.page.wait_for_timeout(500)
    assert browser.page.locator(".distorch-split").count() == 0


def test_a_node_of_a_model_that_is_given_finds_its_size(browser: Browser) -> None:
    browser.open()
    browser.add("UNETLoader")
    browser.page.evaluate("""() => {
        const place = LiteGraph.createNode('DistorchPlaceModel');
        app.graph.add(place);
        const line = place.widgets.find((widget) => widget.name === 'allocation');
        line.value = 'cpu,25%;disk,*';
        line.callback?.(line.value);
        app.graph.nodes[0].connect(0, place, 0);
    }""")
    browser.shows("cpu,25%;disk,*", "MiB")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"Comfy.ColorPalette": "light"}, "the size of the file"),
        ({"Comfy.VueNodes.Enabled": True}, "the size of the file"),
        ({"Comfy.Locale": "zh"}, "文件大小"),
    ],
)
def test_it_draws_in_each_look(browser: Browser, settings: dict[str, Any], words: str) -> None:
    browser.open(**settings)
    browser.add(**{LINE: "cpu,1mb;disk,*"})
    browser.shows("cpu,1mb;disk,*", "1.0 MiB", words)


def test_the_panel_shows_what_runs_and_asks_only_while_it_is_open(browser: Browser) -> None:
    values = {"unet_name": "wan.safetensors", "weight_dtype": "default", "compute_device": "cpu"}
    model = node(LOADER, **values, **{LINE: "cpu,1mb;disk,*"}, eject_models=False)
    browser.server.run(sampled({"model": model}, "web", latent="wan"))
    asked: list[str] = []
    browser.page.on("request", lambda request: asked.append(request.url))
    browser.open()
    browser.page.wait_for_timeout(1500)
    assert not [url for url in asked if url.endswith("/distorch/status")]
    browser.page.click(".distorch-tab-button")
    browser.page.wait_for_selector(".distorch-panel section:nth-of-type(3) table")
    shown = browser.page.inner_text(".distorch-panel")
    for text in ("Memory", "cpu", "disk", "Links", "WAN21", "cpu,1mb;disk,*", "blocks", "streamed"):
        assert text in shown
    asked.clear()
    browser.page.wait_for_timeout(3200)
    assert 2 <= len([url for url in asked if url.endswith("/distorch/status")]) <= 4
    browser.page.click(".distorch-tab-button")
    browser.page.wait_for_timeout(300)
    asked.clear()
    browser.page.wait_for_timeout(1500)
    assert not [url for url in asked if url.endswith("/distorch/status")]


@pytest.mark.parametrize(
    "question",
    [
        None,
        [],
        {"text": 5},
        {"text": "a" * 5000},
        {"virtual_vram_gb": "many"},
        {"files": "model"},
        {"files": ["a"] * 9},
        {"text": "a" * 100_000},
    ],
)
def test_what_is_no_question_is_refused_in_json(server: Server, question: Any) -> None:
    with pytest.raises(Refused) as caught:
        server.post("/distorch/preview", question)
    assert caught.value.answer["error"]["message"]
    assert "Traceback" not in json.dumps(caught.value.answer)


def test_no_answer_names_a_folder_of_the_server(server: Server) -> None:
    names = ["../../../etc/passwd", "/etc/passwd", "flux.safetensors", "a\0b"]
    answers = [server.get("/distorch/status")]
    answers += [server.post("/distorch/preview", {"files": [name]}) for name in names]
    assert [answer["model_bytes"] is not None for answer in answers[1:]] == [
        False,
        False,
        True,
        False,
    ]
    said = json.dumps(answers)
    assert str(server.base) not in said
    assert os.environ["COMFYUI_DIR"] not in said
