"""``distorch plan`` and ``distorch inspect``: from headers alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from distorch import Plan
from distorch.formats import TensorInfo
from distorch.plan.blocks import Block, cut
from distorch.plan.from_names import tree_from_names
from tests.cli.make import environment, invoke
from tests.formats.make import write_gguf, write_safetensors, write_sharded

LAYERS = {
    f"blk.{layer}.{name}.weight": ("Q8_0", shape)
    for layer in range(12)
    for name, shape in {
        "attn_q": (512, 512),
        "ffn_up": (1024, 512),
        "ffn_down": (512, 1024),
    }.items()
}
TENSORS = {
    "output_norm.weight": ("F32", (512,)),
    "token_embd.weight": ("Q8_0", (20_000, 512)),
    **LAYERS,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model.gguf"
    write_gguf(path, tensors=TENSORS)
    return path


def _infos(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    nbytes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    file = Path("model")
    return {n: TensorInfo(n, "BF16", shape, 0, nbytes[n], file) for n, shape in shapes.items()}


def _shape(blocks: tuple[Block, ...]) -> list[tuple[int, bool, bool, set[str]]]:
    """What matters of a cut for a plan: sizes, ways of use and contents, in order."""
    return [
        (b.nbytes, b.looked_up, b.module is None, {part.tensor for part in b.parts}) for b in blocks
    ]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("hidden", [64, 1024, 2048])
def test_names_and_modules_are_cut_alike(hidden: int, tied: bool) -> None:  # noqa: FBT001
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from distorch.integrations.module_tree import Stored, describe

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=40_000,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        llama = LlamaForCausalLM(config).bfloat16()
    shapes = {name: tuple(weight.shape) for name, weight in llama.named_parameters()}
    from_names = cut(tree_from_names(_infos(dict(sorted(shapes.items())))))
    stored = {
        name: Stored(dtype="BF16", shape=tuple(weight.shape), nbytes=weight.nbytes)
        for name, weight in llama.named_parameters()
    }
    assert _shape(from_names) == _shape(cut(describe(llama, stored).root))


def test_a_name_of_many_dots_is_cut_and_not_followed() -> None:
    names = ["." * 30_000, "a" + ".a" * 20_000, "1" * 6000 + ".w", "²"]
    tree = tree_from_names(_infos(dict.fromkeys(names, (4, 4))))
    assert {part.tensor for block in cut(tree) for part in block.parts} == set(names)


def test_a_plan_is_printed(model: Path) -> None:
    done = invoke("plan", model, "--allocation", "cpu,4mb;disk,*")
    assert (done.code, done.err) == (0, "")
    rows = dict(line.split(None, 1) for line in done.out.splitlines())
    assert rows["allocation"].strip() == "cpu,4mb;disk,*"
    assert "in" in rows["disk"]
    assert "ring" in rows


def test_a_plan_is_json_and_a_file(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    done = invoke(
        "plan", model, "--virtual-vram", "0.01", "--donor", "disk", "--json", "--save", file
    )
    assert (done.code, done.err) == (0, "")
    plan = Plan.from_json(file.read_text())
    assert Plan.from_json(json.dumps(done.json["plan"])) == plan
    assert plan.model_bytes == sum(plan.bytes_by_tier.values())
    assert plan.bytes_by_tier["disk"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_that_cannot_be_saved_says_so(model: Path, tmp_path: Path) -> None:
    done = invoke("plan", model, "--save", tmp_path / "missing" / "plan.json")
    assert done.code == 2
    assert done.out == ""
    assert "cannot be written" in done.err


def test_an_inspection_counts(model: Path) -> None:
    facts = invoke("inspect", model, "--json").json
    assert facts["format"] == "gguf"
    assert facts["architecture"] == "tiny"
    assert facts["num_layers"] == 12
    assert facts["num_tensors"] == len(TENSORS)
    assert facts["dtypes"]["F32"] == {"num_tensors": 1, "nbytes": 2048}
    assert facts["nbytes"] == sum(row["nbytes"] for row in facts["dtypes"].values())
    table = invoke("inspect", model).out
    assert "Q8_0" in table
    assert "12" in table


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        ('{"architectures": ["LlamaForCausalLM"]}', "LlamaForCausalLM"),
        ('{"_class_name": "WanTransformer3DModel"}', "WanTransformer3DModel"),
        ('{"architectures": 7}', None),
        ("[" * 100_000, None),
        ("", None),
    ],
)
def test_an_inspection_names_the_architecture_that_a_config_says(
    tmp_path: Path, config: str, architecture: str | None
) -> None:
    write_sharded(tmp_path)
    (tmp_path / "config.json").write_text(config)
    facts = invoke("inspect", tmp_path, "--json").json
    assert facts["architecture"] == architecture
    assert facts["num_layers"] == 2


def test_what_a_file_says_does_not_steer_the_terminal(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", shapes={"w": (2,)})
    config = {"architectures": ["\x1b]0;owned\x07[bold]"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = invoke("inspect", tmp_path).out
    assert "\x1b" not in out
    assert "[bold]" in out


@pytest.mark.parametrize("command", [["--help"], ["run", "--help"], ["plan"], ["inspect"]])
def test_these_answer_without_torch(model: Path, command: list[str]) -> None:
    arguments = command if "--help" in command else [*command, str(model)]
    code = (
        "import sys; from distorch.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    assert done.stdout.endswith("[]\n")
