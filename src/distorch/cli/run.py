"""``distorch run``: text, a picture or a video, by a model whose weights rest as they were told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distorch.cli.demo import find_model
from distorch.cli.loading import Wanted, named
from distorch.cli.options import (
    AllocationOption,
    ComputeDtypeOption,
    ComputeOption,
    DonorOption,
    FramesOption,
    JsonOption,
    Placement,
    RingOption,
    SizeOption,
    VirtualVramOption,
    WeightDtypeOption,
)
from distorch.cli.output import Bar
from distorch.cli.picture import is_pipeline, paint, read_size
from distorch.cli.plan import read_plan
from distorch.cli.text import write
from distorch.errors import ModelError
from distorch.integrations.diffusers.asked import Picture

__all__ = ["HELP", "run"]

HELP = """
Run a model whose weights rest in several memories: text of a language model, or a picture or video
of a pipeline, which is a directory with a model_index.json.

\b
Examples:
  distorch run demo --allocation "cpu,64mb;disk,*" --prompt "The capital of France is"
  distorch run model.gguf --virtual-vram 8 --donor disk --prompt "Once upon a time"
  distorch run model.gguf --plan plan.json --prompt "Once upon a time"
  distorch run model-directory --weight-dtype fp8_e4m3fn --prompt "Once upon a time"
  distorch run model-directory --prompt "Hello" --temperature 0.8 --seed 7 --json
  distorch run FLUX.1-dev --allocation "cuda:0,10gb;cpu,*" --prompt "A fox" --output fox.png
  distorch run FLUX.1-dev --file transformer=flux1-dev-Q4_K.gguf --lora style.safetensors:0.8
    --prompt "A fox" --size 1024x1024 --steps 28
  distorch run Qwen-Image --component "text_encoder=cpu,*" --component "vae=cuda:1,*"
    --allocation "cuda:0,12gb;cpu,*" --prompt "A fox" --explain
  distorch run Wan2.2-I2V --allocation "cuda:0,10gb;cpu,*" --image fox.png --prompt "It runs"
    --size 832x480 --frames 81 --output fox.mp4
"""

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A GGUF file, a directory with safetensors, one with a pipeline, or 'demo'.",
        show_default=False,
    ),
]
PromptOption = Annotated[
    str, typer.Option(metavar="TEXT", help="The text to continue, or to draw.", show_default=False)
]
NumOption = Annotated[int, typer.Option(metavar="N", min=1, help="At most so many tokens more.")]
TemperatureOption = Annotated[
    float, typer.Option(metavar="T", min=0, help="Draw tokens at random; 0 takes the likeliest.")
]
PlanOption = Annotated[
    Path | None,
    typer.Option("--plan", metavar="FILE", help="A plan that `distorch plan --save` wrote."),
]
SeedOption = Annotated[
    int, typer.Option(metavar="N", min=0, max=2**64 - 1, help="What chance begins with.")
]
ExplainOption = Annotated[bool, typer.Option("--explain", help="Print what rests where, first.")]
NegativeOption = Annotated[
    str | None, typer.Option(metavar="TEXT", help="What a picture shall not be.")
]
StepsOption = Annotated[int | None, typer.Option(metavar="N", min=1, help="Steps of denoising.")]
GuidanceOption = Annotated[
    float | None, typer.Option(metavar="X", min=0, help="How much the prompt weighs.")
]
ImageOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The image to edit, or to begin with.")
]
OutputOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A .png or .mp4; several frames as PNG become a folder."),
]
PreviewOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Show the work in a .png, after each step: shapes only."),
]
LoraOption = Annotated[
    list[str],
    typer.Option("--lora", metavar="FILE[:X]", help="A LoRA and its strength; MODEL=FILE, too."),
]
ComponentOption = Annotated[
    list[str],
    typer.Option("--component", metavar="NAME=LINE", help='"vae=cuda:1,*": a line of its own.'),
]
FileOption = Annotated[
    list[str],
    typer.Option("--file", metavar="NAME=FILE", help="A pipeline's model from another file."),
]

_OF_TEXT = ("max_new_tokens", "temperature", "plan")
_OF_PICTURES = (
    *("negative_prompt", "size", "steps", "frames", "guidance", "image", "output", "preview"),
    *("component", "file"),
)


def run(
    context: typer.Context,
    model: ModelArgument,
    *,
    prompt: PromptOption,
    allocation: AllocationOption = None,
    virtual_vram: VirtualVramOption = None,
    donor: DonorOption = None,
    compute: ComputeOption = None,
    ring: RingOption = None,
    weight_dtype: WeightDtypeOption = None,
    compute_dtype: ComputeDtypeOption = None,
    plan: PlanOption = None,
    lora: LoraOption = [],  # noqa: B006  (typer's way to say that there may be several)
    seed: SeedOption = 0,
    max_new_tokens: NumOption = 64,
    temperature: TemperatureOption = 0.0,
    negative_prompt: NegativeOption = None,
    size: SizeOption = None,
    steps: StepsOption = None,
    frames: FramesOption = None,
    guidance: GuidanceOption = None,
    image: ImageOption = None,
    component: ComponentOption = [],  # noqa: B006  (as above)
    file: FileOption = [],  # noqa: B006  (as above)
    output: OutputOption = None,
    preview: PreviewOption = None,
    explain: ExplainOption = False,
    as_json: JsonOption = False,
) -> None:
    """Load a model or a pipeline, run it, and say how it went."""
    placement = Placement(
        allocation=allocation, virtual_vram=virtual_vram, donor=donor, compute=compute, ring=ring
    )
    path, draws = Path(model), is_pipeline(Path(model))
    _refuse(context, model, draws=draws)
    _check_text("--prompt", prompt)
    _check_text("--negative-prompt", negative_prompt or "")
    wanted = Wanted(
        placement=placement,
        plan=None if plan is None else read_plan(plan),
        weight_dtype=weight_dtype,
        compute_dtype=compute_dtype,
        loras=lora,
        components=named("--component", component, "vae=cpu,*"),
        files=named("--file", file, "transformer=flux1-dev-Q4_K.gguf"),
        explain=explain,
    )
    if draws:
        asked = Picture(
            prompt=prompt,
            negative_prompt=negative_prompt,
            size=None if size is None else read_size(size),
            steps=steps,
            seed=seed,
            frames=frames,
            guidance=guidance,
            image=image,
        )
        paint(path, wanted, asked, output=output, preview=preview, as_json=as_json)
        return
    with Bar() as bar:
        path = find_model(model, bar)
    write(
        path,
        wanted,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        as_json=as_json,
    )


def _refuse(context: typer.Context, model: str, *, draws: bool) -> None:
    """Refuse options that mean nothing to such a model.

    Raises:
        ModelError: one was given.
    """
    given = next((n for n in (_OF_TEXT if draws else _OF_PICTURES) if _is_given(context, n)), None)
    if given is None:
        return
    option = f"--{given.replace('_', '-')}"
    if draws:
        raise ModelError(
            f"{option} is for a single model, which writes text: {model} is not",
            hint=f"the same without {option}",
        )
    raise ModelError(
        f"{option} is for a pipeline, which draws: {model} is not",
        hint="a directory with a model_index.json",
    )


def _check_text(option: str, text: str) -> None:
    """Refuse bytes that a terminal of another encoding has given for text.

    Raises:
        ModelError: it holds some.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ModelError(
            f"{option} has bytes at position {error.start} that are not UTF-8",
            hint=f"{option} in UTF-8, which most terminals write under LANG=C.UTF-8",
        ) from error


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
