"""LoRAs on a distributed module: peft's sums, the same bits wherever weights rest, and no trace."""

from __future__ import annotations

import copy
import functools
import gc
import threading
from pathlib import Path

import peft
import psutil
import pytest
import torch
from torch import Tensor, nn

import distorch
from distorch.errors import ModelError
from tests.integrations.loras import (
    LINES,
    MACHINE,
    RANK,
    WIDTH,
    Net,
    distributed,
    first,
    made,
    run,
    second,
)
from tests.integrations.make import equal, num_hooks, num_readers, open_files

pytestmark = pytest.mark.usefixtures("many_blocks")


@functools.cache
def resident(form: str, num_loras: int) -> Tensor:
    """What a model computes with LoRAs, all of its weights at rest."""
    module = made(form)
    handle = distributed(module, LINES[0])
    for number, tensors in enumerate([first(), second()][:num_loras]):
        handle.add_lora(tensors, 0.5 + number)
    found = run(module)
    handle.remove()
    return found


@pytest.mark.parametrize("num_loras", range(3))
@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("form", ["float32", "bfloat16", "Q8_0", "Q4_K"])
def test_streamed_gives_the_bits_of_resident(form: str, line: str, num_loras: int) -> None:
    module = made(form)
    plain = run(module)
    handle = distributed(module, line)
    for number, tensors in enumerate([first(), second()][:num_loras]):
        handle.add_lora(tensors, 0.5 + number)
    for _ in range(3):
        assert torch.equal(run(module), resident(form, num_loras))
    assert all(lora.stats().num_unplanned == 0 for lora in handle.loras.values())
    handle.remove()
    assert torch.equal(run(module), plain)
    assert torch.equal(resident(form, num_loras), plain) is (num_loras == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_that_of_peft_on_the_dense_module(dtype: torch.dtype, tmp_path: Path) -> None:
    module = Net(dtype)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=6,
        target_modules=["embed", "conv", "layers.0", "layers.1", "layers.2"],
        rank_pattern={"layers.0": 3},
        alpha_pattern={"layers.2": 30},
    )
    wrapped = peft.get_peft_model(copy.deepcopy(module), config, autocast_adapter_dtype=False)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained(str(tmp_path))
    handle = distributed(module, LINES[2])
    handle.add_lora(tmp_path, strict=True)
    expected = run(wrapped)
    largest = float(expected.abs().max())
    bound = 1e-6 if dtype == torch.float32 else 2**-6
    assert float((run(module) - expected).abs().max()) <= bound * largest
    assert float((expected - resident_plain(module)).abs().max()) > 0.1 * largest


def resident_plain(module: nn.Module) -> Tensor:
    distorch.handle_of(module).remove()
    return run(module)


def test_a_lora_rests_as_the_model_does_or_where_it_is_told() -> None:
    handle = distributed(Net(), LINES[2])
    like, own = handle.add_lora(first()), handle.add_lora(second(), allocation="cpu,0b;disk,*")
    assert own.plan.bytes_by_tier["cpu"] == 0
    share = like.plan.bytes_by_tier["disk"] / sum(like.plan.bytes_by_tier.values())
    assert 0.3 < share < 0.7
    assert like.plan.bytes_by_tier.keys() == handle.plan.bytes_by_tier.keys()
    handle.remove()


def test_its_own_weights_stream_in_the_order_of_the_steps() -> None:
    module = Net()
    handle = distributed(module, LINES[0])
    lora = handle.add_lora(first(), allocation="cpu,0b;disk,*")
    expected = run(module)
    before = lora.stats()
    assert torch.equal(run(module), expected)
    after = lora.stats()
    assert after.num_steps == before.num_steps + 1
    assert after.streamed_bytes + after.cached_bytes > before.streamed_bytes + before.cached_bytes
    assert after.num_unplanned == 0
    assert handle.stats().streamed_bytes == 0
    handle.remove()


def test_no_weight_of_the_model_visits_more_often_for_it() -> None:
    """DoRA looks at a bias while that is there."""
    module = Net()
    handle = distributed(module, LINES[1])

    def num_visits() -> int:
        run(module)
        before = handle.stats().num_visits
        run(module)
        return handle.stats().num_visits - before

    alone = num_visits()
    handle.add_lora(second())
    assert num_visits() == alone
    handle.remove()


def test_a_strength_is_set_between_steps_and_moves_no_byte() -> None:
    module = Net()
    handle = distributed(module, LINES[1])
    plain = run(module)
    lora = handle.add_lora(second())
    whole = run(module)
    moved, own = handle.stats(), lora.stats()
    for strength in (0.0, 0.3, 1.0):
        lora.strength = strength
    again = handle.stats(), lora.stats()
    assert [(each.streamed_bytes, each.cached_bytes) for each in again] == [
        (each.streamed_bytes, each.cached_bytes) for each in (moved, own)
    ]
    assert torch.equal(run(module), whole)
    lora.strength = 0
    assert torch.equal(run(module), plain)
    assert handle.stats().num_unplanned == moved.num_unplanned
    handle.remove()


def test_adding_and_removing_a_hundred_times_leaves_nothing() -> None:
    module, fresh = Net(), dict(Net().named_parameters())
    plain = run(module)
    handle = distributed(module, LINES[1])
    tensors = {**first(rank=64), **second()}  # 1.4 MB: a hundred that stayed would be seen
    tensors = {key: each for key, each in tensors.items() if not key.startswith("layers.")}
    for cycle in range(120):
        handle.add_lora(tensors)
        assert torch.equal(run(module), plain) is False
        handle.loras["lora"].remove()
        assert not handle.loras
        if cycle == 19:  # allocators have what they keep
            gc.collect()
            counted = num_hooks(module), num_readers(), open_files(), handle.weight_bytes
            before = _rss()
    assert counted == (num_hooks(module), num_readers(), open_files(), handle.weight_bytes)
    gc.collect()
    assert _rss() - before < 16 << 20
    assert torch.equal(run(module), plain)
    handle.remove()
    assert num_hooks(module) == 0
    assert all(equal(each, fresh[name]) for name, each in module.named_parameters())


def _rss() -> int:
    return int(psutil.Process().memory_info().rss)


def test_removing_one_of_two_leaves_the_other() -> None:
    module = Net()
    handle = distributed(module, LINES[1])
    one = handle.add_lora(first())
    expected = run(module)
    two = handle.add_lora(second(), name="two")
    assert list(handle.loras) == ["lora", "two"]
    assert not torch.equal(run(module), expected)
    for _ in range(2):
        two.remove()
    with pytest.raises(ModelError, match="'two' was removed"):
        two.stats()
    assert torch.equal(run(module), expected)
    assert list(handle.loras.values()) == [one]
    handle.remove()
    assert not handle.loras


def test_rebudget_keeps_them_and_rests_them_by_the_new_line() -> None:
    module = Net()
    handle = distributed(module, LINES[0])
    lora, own = handle.add_lora(first()), handle.add_lora(second(), allocation="cpu,0b;disk,*")
    expected = run(module)
    for line in (*LINES[1:], LINES[0]):
        handle.rebudget(line, machine=MACHINE)
        for _ in range(2):
            assert torch.equal(run(module), expected)
        assert (lora.plan.bytes_by_tier.get("disk", 0) > 0) is (line != LINES[0])
        assert own.plan.bytes_by_tier["cpu"] == 0
    handle.remove()


def test_a_pass_that_raises_leaves_the_next_one_whole() -> None:
    class Broken(Net):
        fails = False

        def forward(self, ids: Tensor) -> Tensor:
            x: Tensor = self.layers[0](self.embed(ids))
            if self.fails:
                raise KeyboardInterrupt
            return super().forward(ids) + x.mean()

    module = Broken()
    handle = distributed(module, LINES[1])
    handle.add_lora(first())
    expected = run(module)
    Broken.fails = True
    with pytest.raises(KeyboardInterrupt):
        run(module)
    Broken.fails = False
    assert torch.equal(run(module), expected)
    handle.remove()


def test_threads_take_turns() -> None:
    module = Net()
    handle = distributed(module, LINES[1])
    for tensors in (first(), second()):
        handle.add_lora(tensors)
    expected = run(module)
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda: found.append(torch.equal(run(module), expected)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == [True] * 4
    handle.remove()


def test_a_model_of_one_module_takes_one() -> None:
    module = nn.Linear(WIDTH, WIDTH)
    root = nn.Sequential(module)
    x = torch.randn(3, WIDTH)
    down, up = torch.randn(RANK, WIDTH), torch.randn(WIDTH, RANK)
    handle = distributed(root, LINES[1])
    handle.add_lora({"0.lora_A.weight": down, "0.lora_B.weight": up}, 0.5)
    with torch.inference_mode():
        assert torch.allclose(root(x), module(input=x))
        found = root(x)
        handle.remove()
        assert torch.allclose(found, module(x) + 0.5 * (x @ down.T @ up.T), atol=1e-4)
