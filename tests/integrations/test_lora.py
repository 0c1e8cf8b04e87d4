"""LoRAs on a distributed module: peft's sums, the same bits wherever weights rest, and no trace."""

from __future__ import annotations

import copy
import functools
import gc
import threading
from pathlib import Path
from typing import Any

import peft
import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import distorch
from distorch.errors import AllocationError, DistorchError, FormatError, ModelError, StorageError
from distorch.integrations import planning
from distorch.integrations.attach import Handle
from distorch.plan.blocks import cut
from distorch.quant.tensor import QuantTensor
from tests.integrations.make import equal, num_hooks, num_readers, open_files
from tests.integrations.test_packed_modules import Net as PackedNet
from tests.plan_strategies import roomy

MACHINE = roomy("cpu", "disk")
LINES = ["cpu,*", "cpu,0b;disk,*", "cpu,50%;disk,50%"]
WIDTH, RANK = 256, 8
IDS = torch.arange(12).view(2, 6)


@pytest.fixture(autouse=True)
def _many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "cut", functools.partial(cut, target_bytes=1))


class Net(PackedNet):
    """The network of the packed modules, not packed, of random weights."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        super().__init__("Q8_0")
        for module in self.modules():
            weight = module._parameters.get("weight")
            if isinstance(weight, QuantTensor):
                module.weight = nn.Parameter(weight.materialize(), requires_grad=False)
        self.head.weight = self.embed.weight
        self.to(dtype)


def made(form: str) -> nn.Module:
    """The network in a form: the same each time."""
    if form in {"float32", "bfloat16"}:
        return Net(getattr(torch, form))
    torch.manual_seed(0)
    return PackedNet(form)


def first(*, rank: int = RANK, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A LoRA of every module that takes one."""
    sizes = {"conv": ((WIDTH, 3), WIDTH), "head": ((WIDTH,), 64)}
    sizes |= {f"layers.{number}": ((WIDTH,), WIDTH) for number in range(3)}
    random = torch.Generator().manual_seed(1)
    tensors = {
        "embed.lora_embedding_A": torch.randn(rank, 64, generator=random),
        "embed.lora_embedding_B": torch.randn(WIDTH, rank, generator=random),
    }
    for name, (inputs, outputs) in sizes.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, *inputs, generator=random)
        one = (1,) * (len(inputs) - 1)
        tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, *one, generator=random)
    return {name: (0.05 * tensor).to(dtype) for name, tensor in tensors.items()}


def second() -> dict[str, Tensor]:
    """One of each other kind."""
    random = torch.Generator().manual_seed(2)

    def weight(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=random)

    return {
        "layers.0.lora_A.weight": weight(RANK, WIDTH),
        "layers.0.lora_B.weight": weight(WIDTH, RANK),
        "layers.0.lora_magnitude_vector": 1.5 + weight(WIDTH),
        "layers.1.lokr_w1": weight(16, 16),
        "layers.1.lokr_w2_a": weight(16, 2),
        "layers.1.lokr_w2_b": weight(2, 16),
        "layers.1.alpha": torch.tensor(1.0),
        "layers.2.hada_w1_a": weight(WIDTH, 2),
        "layers.2.hada_w1_b": weight(2, WIDTH),
        "layers.2.hada_w2_a": weight(WIDTH, 2),
        "layers.2.hada_w2_b": weight(2, WIDTH),
        "layers.2.diff_b": weight(WIDTH),
        "conv.diff_b": weight(WIDTH),
    }


def distributed(module: nn.Module, line: str) -> Handle:
    return distorch.distribute(module, line, machine=MACHINE)


def run(module: nn.Module) -> Tensor:
    with torch.inference_mode():
        result = module(IDS)
    assert isinstance(result, Tensor)
    return result


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


DIALECTS = {
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", "."),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", "."),
    "Kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "_"),
    "ComfyUI": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight", "."),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_of_names_gives_the_same_bits(dialect: str, tmp_path: Path) -> None:
    plain = {name: each for name, each in first().items() if "embedding" not in name}
    down, up, dot = DIALECTS[dialect]
    renamed = {}
    for name, tensor in plain.items():
        target, _, which = name.partition(".lora_")
        form = down if which.startswith("A") else up
        renamed[form.format(target.replace(".", dot))] = tensor
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 8}', encoding="utf-8")
    save_file(renamed, tmp_path / "style.safetensors")
    found = []
    for source in (plain, tmp_path / "style.safetensors"):
        module = Net()
        handle = distributed(module, LINES[1])
        lora = handle.add_lora(source, 0.7, strict=True)
        assert lora.targets == ("conv", "head", "layers.0", "layers.1", "layers.2")
        found.append(run(module))
        handle.remove()
    assert torch.equal(*found)
    assert lora.name == "style"


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
            counted = num_hooks(module), num_readers(), open_files(), handle.weight_bytes
            gc.collect()
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


class TestErrors:
    """What cannot be added is told, and nothing has changed."""

    @pytest.fixture
    def handle(self) -> Any:
        module = nn.ModuleDict(
            {"net": Net(), "attention": nn.MultiheadAttention(8, 2), "stack": nn.LSTM(8, 8)}
        )
        handle = distributed(module, LINES[1])
        before = num_hooks(module)
        yield handle
        assert num_hooks(module) == before
        assert not handle.loras
        handle.remove()

    @staticmethod
    def pair(name: str, inputs: int = WIDTH, outputs: int = WIDTH) -> dict[str, Tensor]:
        down, up = torch.randn(2, inputs), torch.randn(outputs, 2)
        return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}

    def test_for_another_model(self, handle: Handle) -> None:
        strange = {k: v for i in range(5) for k, v in self.pair(f"blocks.{i}.attn").items()}
        with pytest.raises(ModelError, match=r"none of the 5 modules .*'blocks.0.attn'.* 2 more"):
            handle.add_lora(strange)

    def test_in_part_for_another_model(self, handle: Handle) -> None:
        mixed = {**self.pair("net.layers.0"), **self.pair("net.layers.9"), "net.x": torch.ones(1)}
        said = r"of the 2 modules .* 1 were found; 2 names .*'net.layers.9', 'net.x'"
        with pytest.raises(ModelError, match=said):
            handle.add_lora(mixed, strict=True)
        with pytest.warns(UserWarning, match=said):
            lora = handle.add_lora(mixed)
        assert lora.targets == ("net.layers.0",)
        lora.remove()

    def test_of_another_shape(self, handle: Handle) -> None:
        said = r"net.layers.0: .*\(2, 128\), .*\(256, 256\)"
        with pytest.raises(ModelError, match=said):
            handle.add_lora(self.pair("net.layers.0", inputs=128))

    def test_on_a_module_that_takes_none(self, handle: Handle) -> None:
        with pytest.raises(ModelError, match=r"stack: .* LSTM"):
            handle.add_lora(self.pair("stack"))

    def test_on_a_module_whose_forward_is_never_called(self, handle: Handle) -> None:
        with pytest.raises(ModelError, match=r"attention.out_proj, whose forward .* never"):
            handle.add_lora(self.pair("attention.out_proj", 8, 8))

    def test_that_does_not_fit(self, handle: Handle) -> None:
        with pytest.raises(AllocationError):
            handle.add_lora(self.pair("net.layers.0"), allocation="cpu,1b")

    @pytest.mark.parametrize("strength", [float("nan"), float("inf"), "much"])
    def test_of_no_strength(self, handle: Handle, strength: Any) -> None:
        with pytest.raises(ModelError, match="not a finite number"):
            handle.add_lora(self.pair("net.layers.0"), strength)
        lora = handle.add_lora(self.pair("net.layers.0"), 0.5)
        with pytest.raises(ModelError, match="not a finite number"):
            lora.strength = strength
        assert lora.strength == 0.5
        lora.remove()

    def test_whose_name_is_taken(self, handle: Handle) -> None:
        lora = handle.add_lora(self.pair("net.layers.0"), name="mine")
        with pytest.raises(ModelError, match="'mine' is there already"):
            handle.add_lora(self.pair("net.layers.1"), name="mine")
        others = [handle.add_lora(self.pair("net.layers.1")) for _ in range(3)]
        assert [each.name for each in others] == ["lora", "lora-2", "lora-3"]
        for each in (lora, *others):
            each.remove()

    def test_with_holes_is_warned_about(self, handle: Handle) -> None:
        tensors = self.pair("net.layers.0")
        tensors["net.layers.0.lora_B.weight"][0, 0] = float("nan")
        with pytest.warns(UserWarning, match=r"1 tensors hold NaN .*'net.layers.0.lora_B.weight'"):
            handle.add_lora(tensors).remove()

    def test_a_peft_file_without_its_configuration_is_warned_about(self, handle: Handle) -> None:
        with pytest.warns(UserWarning, match="alpha is taken as the rank"):
            handle.add_lora(self.pair("base_model.model.net.layers.0")).remove()

    @pytest.mark.parametrize(
        ("tensors", "problem"),
        [
            ({}, "no tensors"),
            ({"weight": torch.ones(2)}, "not a LoRA"),
            ({"a.alpha": torch.ones(2), **pair("a", 2, 2)}, "not one number"),
            ({"a": "text"}, "not a tensor"),
            (pair("net.layers.0") | {"net.layers.0.lora_A.weight": torch.ones(0, 256)}, "rank 0"),
        ],
    )
    def test_that_is_none(self, handle: Handle, tensors: Any, problem: str) -> None:
        with pytest.raises(FormatError, match=problem):
            handle.add_lora(tensors)

    def test_files(self, handle: Handle, tmp_path: Path) -> None:
        with pytest.raises(StorageError):
            handle.add_lora(tmp_path / "missing.safetensors")
        for content in (b"", b"GGUF", b"text"):
            (tmp_path / "x.safetensors").write_bytes(content)
            with pytest.raises(DistorchError, match=r"x\.safetensors"):
                handle.add_lora(tmp_path / "x.safetensors")

    def test_after_the_handle_is_gone(self) -> None:
        handle = distributed(Net(), LINES[1])
        handle.remove()
        with pytest.raises(ModelError, match="was removed"):
            handle.add_lora(first())
