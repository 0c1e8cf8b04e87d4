"""The documents: their examples run, their commands exist, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import typer.main

from distorch import Allocation, vgpu
from distorch.cli import app
from examples import tiny

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")
DOCUMENTS = [
    *READMES,
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "examples/README.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]


class Code(NamedTuple):
    """One fenced block."""

    language: str
    text: str


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_of(name: str) -> list[Code]:
    return [
        Code(*found)
        for found in re.findall(r"^```(\w*)\n(.*?)^```$", read(name), re.MULTILINE | re.DOTALL)
    ]


def prose_of(name: str) -> str:
    """The text without its code, whose comments look like headings."""
    return re.sub(r"^```.*?^```$", "", read(name), flags=re.MULTILINE | re.DOTALL)


def headings(name: str) -> list[str]:
    return re.findall(r"^#+(?= )", prose_of(name), re.MULTILINE)


def anchors(name: str) -> set[str]:
    """The names under which a heading can be reached, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose_of(name), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def without_comments(text: str) -> str:
    return re.sub(r" +# .*", "", text)


def examples(about: str) -> list[str]:
    """The examples in Python: on the demo model, virtual cards, a pipeline, or plain modules."""
    marks = {"gemma3": "demo", "vgpu": "vgpu", "FLUX": "pipeline", "": "plain"}
    blocks = [code.text for code in code_of("README.md") if code.language == "python"]
    topics = {text: next(marks[mark] for mark in marks if mark in text) for text in blocks}
    return [text for text, topic in topics.items() if topic == about]


def commands(name: str) -> list[list[str]]:
    """Every line of a shell block, and every bit of code in the text, that is a command."""
    shell = [code.text for code in code_of(name) if code.language == "sh"]
    joined = [text.replace("\\\n", "") for text in shell]
    lines = [
        re.sub(r"^DISTORCH_VGPU=\S+ ", "", line) for text in joined for line in text.splitlines()
    ]
    lines += re.findall(r"(?<!`)`((?:make|distorch) [^`]+)`(?!`)", prose_of(name))
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_readme_has_examples() -> None:
    topics = ("plain", "demo", "vgpu", "pipeline")
    assert [len(examples(about)) for about in topics] == [2, 1, 1, 1]


def test_the_examples_of_the_readme_run(capsys: pytest.CaptureFixture[str]) -> None:
    for text in examples("plain"):
        exec(compile(text, "README.md", "exec"), {})  # noqa: S102  what is tested
    assert "streamed each step" in capsys.readouterr().out


def test_the_example_of_a_pipeline_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (text,) = examples("pipeline")
    (tmp_path / "FLUX.1-dev").symlink_to(tiny.pipeline("flux"))
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "README.md", "exec"), {})  # noqa: S102  what is tested
    assert (tmp_path / "fox.png").stat().st_size > 0
    assert "text_encoder_2 {'cpu': 0, 'disk': 8" in capsys.readouterr().out


@pytest.mark.skipif(bool(vgpu.why_not()), reason="no virtual GPU can be built here")
def test_the_example_on_virtual_cards_finds_its_race() -> None:
    (text,) = examples("vgpu")  # in a process of its own: torch keeps such a device for good
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert "is not ordered after the write by copy" in done.stdout
    assert f"{256 * 256 * 4} bytes went to vgpu:0" in done.stdout


@pytest.mark.parametrize("name", READMES)
def test_every_command_exists(name: str) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", read("Makefile"), re.MULTILINE))
    group = typer.main.get_command(app)
    known = getattr(group, "commands", {})
    wanted = [words for words in commands(name) if words[0] in {"make", "distorch"}]
    assert len(wanted) > len(known), "there are commands to look at"
    for program, *words in wanted:
        plain = [word for word in words if not word.startswith("-") and "=" not in word]
        if program == "make":
            assert plain[-1] in targets
            continue
        if words == ["--help"]:
            continue
        if plain[0] == "monitor":
            assert plain[0] not in known, "it is here now: say so"
            continue
        options = {option for parameter in known[plain[0]].params for option in parameter.opts}
        options |= {"--help", "-h"}
        assert {word for word in words if word.startswith("--")} <= options


def test_every_line_of_the_language_reads() -> None:
    _, _, rest = read("README.md").partition("## The allocation language")
    lines = re.findall(r"^\| `([^`]+)` \|", rest.partition("\n## ")[0], re.MULTILINE)
    assert lines
    assert [str(Allocation.parse(line)) for line in lines] == lines


def test_both_readmes_have_the_same_shape() -> None:
    english, chinese = READMES
    assert headings(english) == headings(chinese)
    for pattern in (r"^\|", r"^- ", r"<!-- [\w ]+ -->"):
        ours, theirs = (re.findall(pattern, read(name), re.MULTILINE) for name in READMES)
        assert ours == theirs, pattern


def test_both_readmes_have_the_same_code() -> None:
    english, chinese = (
        [(code.language, without_comments(code.text)) for code in code_of(name)] for name in READMES
    )
    assert english == chinese
    assert sorted(map(tuple, commands(READMES[0]))) == sorted(map(tuple, commands(READMES[1])))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_resolve(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(name)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.relative_to(ROOT).as_posix()), target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named_are_there(name: str) -> None:
    text = prose_of(name)
    for path in re.findall(r"`((?:tests|docs|scripts|\.ci)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:plan|tiers|quant|run|formats|integrations|cli)/\w+\.\w+)`", text):
        assert (ROOT / "src" / "distorch" / path).exists(), path


def test_six_files_to_dive_into() -> None:
    _, _, rest = read("README.md").partition("## Dive into the code")
    assert len(re.findall(r"^- \[", rest.partition("\n## ")[0], re.MULTILINE)) == 6
