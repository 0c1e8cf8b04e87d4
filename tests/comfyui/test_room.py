"""A placed model keeps within the room that ComfyUI has on a virtual card."""

from __future__ import annotations

from typing import Any

import pytest

from tests.comfyui.cards import (
    PLENTY,
    core,
    empty,
    give_room,
    lined,
    live,
    new_seed,
    on_cards,
)
from tests.comfyui.graphs import Graph
from tests.comfyui.server import Server

pytestmark = pytest.mark.slow


def test_a_model_keeps_within_the_room_that_comfyui_has(here: Server, flux: str) -> None:
    model = flux  # the largest block of this wan is half of it
    asked = lined(model, "ours", new_seed())
    here.run(asked)
    whole = live(here)[0]
    for part in (0.9, 0.75, 0.65):
        seed, room = new_seed(), int(whole * part)
        if part != 0.75:  # once it is on the card already, and gives up some
            empty(here)
        give_room(here, room)
        here.run(lined(model, "ours", seed))
        assert 0 < live(here)[0] <= room
        on_cards(here, "ours")
    give_room(here, PLENTY)
    here.run(core(model, "core", seed))
    here.same("ours", "core")
    assert "ComfyUI has room for" in here.log


def test_it_goes_back_to_the_line_when_there_is_room_again(here: Server, flux: str) -> None:
    model = flux
    here.run(lined(model, "ours", new_seed()))
    cards, planned = on_cards(here, "ours")
    give_room(here, cards[0] - 1)
    here.run(lined(model, "ours", new_seed()))
    assert 0 < live(here)[0] < cards[0]
    give_room(here, PLENTY)
    here.run(lined(model, "ours", new_seed()))
    assert live(here) == cards
    assert on_cards(here, "ours")[1] == planned


def test_two_models_share_a_small_card(here: Server, flux: str) -> None:
    def both(seed: int) -> Graph:
        graphs = {
            "a": lined(flux, "a", seed),
            "b": lined(flux, "b", seed, "vgpu:0,40%;vgpu:2,*"),
        }
        return {
            f"{prefix}{key}": {**each, "inputs": _prefixed(prefix, each["inputs"])}
            for prefix, graph in graphs.items()
            for key, each in graph.items()
        }

    seed = new_seed()
    here.run(both(seed))
    together = live(here)[0]
    empty(here)
    room = together * 3 // 4
    give_room(here, room)
    for seed in (new_seed(), new_seed()):
        here.run(both(seed))
        now = here.get("/vgpu")
        assert now["live"][0] == sum(now["loaded"]) <= room
    give_room(here, PLENTY)
    here.run(core(flux, "core", seed))
    here.same("a", "core")
    here.same("b", "core")


def _prefixed(prefix: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Let a node's links lead to the nodes of its own graph."""
    return {
        key: [f"{prefix}{value[0]}", value[1]] if isinstance(value, list) else value
        for key, value in inputs.items()
    }
