"""What the demo continues: the first tokens of named files."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from effops.bench.demo.options import PROMPT_TOKENS
from effops.models import ModelConfig, Tokenizer
from effops.models.shipped import heldout_files

QUICK_PROMPTS = 2


@dataclass(frozen=True)
class Prompt:
    """A file's name and its first tokens."""

    name: str
    tokens: list[int]


def _files(arguments: argparse.Namespace) -> list[Path]:
    return arguments.prompt_file or heldout_files()[: QUICK_PROMPTS if arguments.quick else None]


def whole_files(arguments: argparse.Namespace, tokenizer: Tokenizer) -> list[list[int]]:
    """All tokens of the files, in the order of ``collect``."""
    return [tokenizer.encode(_text(path)) for path in _files(arguments)]


def collect(arguments: argparse.Namespace, config: ModelConfig, tokenizer: Tokenizer) -> list[Prompt]:
    """The prompts that the options ask for; ValueError names the file that does not fit."""
    own = bool(arguments.prompt_file)
    room = config.context_length - arguments.new_tokens + 1  # the last new token is not fed back
    prompts = []
    for path in _files(arguments):
        tokens = tokenizer.encode(_text(path))
        wanted = arguments.prompt_tokens or (None if own else PROMPT_TOKENS)
        tokens = tokens[:wanted]
        if not tokens:
            raise ValueError(f"{path}: prompt: expected at least one token, got none")
        if len(tokens) > room:
            raise ValueError(
                f"{path}: prompt: expected at most {room} tokens (a context of {config.context_length} with "
                f"{arguments.new_tokens} new ones), got {len(tokens)}"
            )
        prompts.append(Prompt(path.name.removesuffix(".txt"), tokens))
    return prompts


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: text: expected readable UTF-8, got {error}") from None
