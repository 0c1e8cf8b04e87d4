"""What a node's inputs come to: for any text an answer, and the numbers of the language itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distorch.allocation import Allocation
from distorch.errors import DistorchError
from distorch.integrations.comfyui.preview import MAX_CHARACTERS, Question, links_of, preview
from distorch.machine import Machine, Tier

GIB = 2**30
MACHINE = Machine(
    name="box",
    tiers=(
        Tier(name="cuda:0", capacity_bytes=12 * GIB, free_bytes=10 * GIB),
        Tier(name="cuda:1", capacity_bytes=24 * GIB, free_bytes=20 * GIB),
        Tier(name="cpu", capacity_bytes=64 * GIB, free_bytes=32 * GIB),
        Tier(name="disk", capacity_bytes=900 * GIB, free_bytes=500 * GIB),
    ),
)
LINES = st.text(alphabet="cudapisk:019,;.%*gbm ", max_size=40)


def ask(text: str = "", **more: Any) -> dict[str, Any]:
    return preview(Question.read({"text": text, **more}), MACHINE)


def by_device(answer: dict[str, Any], what: str) -> dict[str, Any]:
    return {entry["device"]: entry[what] for entry in answer["entries"]}


@given(text=LINES, size=st.none() | st.integers(0, 2**45))
def test_every_text_has_an_answer_that_json_can_carry(text: str, size: int | None) -> None:
    answer = ask(text, model_bytes=size)
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    if answer["error"] is None and size:
        assert sum(by_device(answer, "bytes").values()) == size


@given(text=LINES)
def test_a_place_lies_in_the_line_that_is_shown(text: str) -> None:
    error = ask(text)["error"]
    if error is not None and error["position"] is not None:
        assert 0 <= error["position"] <= len(error["text"])


def test_the_parts_are_those_of_the_language() -> None:
    size = 17 * GIB
    for line in ("cuda:0,6gb;cuda:1,*", "cuda:0,30%;cpu,70%", "cuda:0,0.4;cpu,0.4", "auto"):
        resolved = Allocation.parse(line).resolve(size, MACHINE)
        assert by_device(ask(line, model_bytes=size), "bytes") == dict(resolved.bytes_by_tier)


def test_without_a_size_shares_are_of_the_model() -> None:
    assert by_device(ask("cuda:0,1%;cpu,3%"), "share") == {"cuda:0": 0.25, "cpu": 0.75}
    assert by_device(ask("cuda:0,25%;cpu,*"), "share") == {"cuda:0": 0.25, "cpu": 0.75}
    assert by_device(ask("cuda:0,25%;cpu,*"), "bytes") == {"cuda:0": None, "cpu": None}


def test_without_a_size_bytes_are_as_written_and_the_rest_is_not_known() -> None:
    assert by_device(ask("cuda:0,2gb;cpu,*"), "bytes") == {"cuda:0": 2 * GIB, "cpu": None}
    assert by_device(ask("cuda:0,0.5;cpu,0.25"), "bytes") == {"cuda:0": 6 * GIB, "cpu": 16 * GIB}
    assert by_device(ask("cuda:0,*"), "share") == {"cuda:0": 1.0}


def test_a_wrong_line_shows_the_parsers_own_place() -> None:
    error = ask("cuda:0,2gbb;cpu,*")["error"]
    assert error == {
        "message": "unknown unit 'gbb': use b, kb, mb, gb or tb",
        "hint": "cuda:0,2gb;cpu,*",
        "text": "cuda:0,2gbb;cpu,*",
        "position": 8,
        "length": 3,
    }


def test_a_line_that_does_not_fit_is_drawn_and_its_error_too() -> None:
    answer = ask("cuda:0,16gb;cpu,*", model_bytes=20 * GIB)
    assert by_device(answer, "bytes") == {"cuda:0": 16 * GIB, "cpu": 4 * GIB}
    assert "6.00 GiB too much" in answer["error"]["message"]
    assert ask(answer["error"]["hint"], model_bytes=20 * GIB)["error"] is None


@pytest.mark.parametrize("text", ["cuda:7,1gb;cpu,*", "disk,*", "cuda:0,1gb;xpu:0,*"])
def test_a_device_that_is_not_here_is_pointed_at(text: str) -> None:
    error = ask(text)["error"]
    device = next(name for name in ("cuda:7", "disk", "xpu:0") if name in text)
    assert text[error["position"] :].startswith(device)


def test_the_normal_mode_is_written_as_a_line() -> None:
    node: dict[str, Any] = {
        "compute_device": "cuda:0",
        "virtual_vram_gb": 4.0,
        "donor_device": "cpu",
    }
    assert ask(**node)["canonical"] == "cuda:0,*;cpu,4gb"
    assert by_device(ask(**node, model_bytes=3 * GIB), "bytes") == {"cuda:0": 0, "cpu": 3 * GIB}
    assert ask("cuda:1,*", **node)["canonical"] == "cuda:1,*"


def test_a_donor_that_computes_itself_keeps_the_whole_model() -> None:
    node: dict[str, Any] = {"compute_device": "cpu", "virtual_vram_gb": 4.0, "donor_device": "cpu"}
    assert by_device(ask(**node, model_bytes=8 * GIB), "bytes") == {"cpu": 8 * GIB}


def test_the_first_form_of_the_nodes_lends_from_all_others() -> None:
    node: dict[str, Any] = {"compute_device": "cuda:0", "virtual_vram_gb": 24}
    assert ask(**node, use_other_vram=False)["canonical"] == "cuda:0,*;cpu,24gb"
    lent = by_device(ask(**node, use_other_vram=True, model_bytes=30 * GIB), "bytes")
    assert lent == {"cuda:0": 6 * GIB, "cuda:1": 20 * GIB, "cpu": 4 * GIB}


def test_a_device_that_was_chosen_elsewhere_is_named() -> None:
    error = ask(compute_device="cuda:5", virtual_vram_gb=4)["error"]
    assert "'cuda:5'" in error["message"]
    assert error["position"] is None


@pytest.mark.parametrize(
    "data",
    [
        [],
        None,
        {"text": 5},
        {"text": "a" * (MAX_CHARACTERS + 1)},
        {"compute_device": ["cpu"]},
        {"virtual_vram_gb": float("nan")},
        {"virtual_vram_gb": float("inf")},
        {"virtual_vram_gb": -1},
        {"virtual_vram_gb": "4"},
        {"use_other_vram": 1},
        {"model_bytes": True},
        {"model_bytes": 10**400},
    ],
)
def test_what_is_no_question_is_refused_with_one_that_is(data: object) -> None:
    with pytest.raises(DistorchError) as caught:
        Question.read(data)
    hint = caught.value.hint
    assert Question.read(json.loads(hint if hint.startswith("{") else f"{{{hint}}}"))


def test_links_say_their_speed() -> None:
    machine = Machine.load("rtx4070-12gb")
    assert len(links_of(machine)) == len(machine.links)
