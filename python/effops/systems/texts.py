"""Tokens that systems are measured on and calibrated with."""

from __future__ import annotations

import random
import string
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from effops.models import Tokenizer
from effops.models.shipped import heldout_files

SPELLING = (
    "alfa", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima", "mike",
    "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey", "xray", "yankee",
    "zulu",
)  # fmt: skip
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def held_out(tokenizer: Tokenizer, tokens: int) -> Tensor:
    """The first tokens of each shipped held-out file that has so many, int64 ``[files, tokens]``."""
    texts = [tokenizer.encode(path.read_text(encoding="utf-8"))[:tokens] for path in heldout_files()]
    return torch.tensor([ids for ids in texts if len(ids) == tokens])


def training_like(tokenizer: Tokenizer, blocks: int, tokens: int) -> Tensor:
    """Blocks from modules of this interpreter's standard library, which the shipped model learned a version of; none
    is held out. int64 ``[blocks, tokens]``, each from the middle of another file.

    Raises:
        ValueError: the library's sources are not there, or are too few.
    """
    kept_out = {path.name.removesuffix(".txt") for path in heldout_files()}
    folder = Path(sysconfig.get_path("stdlib"))
    found: list[list[int]] = []
    for path in sorted(folder.glob("*.py")):
        if path.name in kept_out or len(found) == blocks:
            continue
        text = path.read_text(encoding="utf-8")
        ids = tokenizer.encode(text[len(text) // 4 : len(text) // 4 + 16 * tokens])[:tokens]
        if len(ids) == tokens:
            found.append(ids)
    if len(found) < blocks:
        raise ValueError(f"training_like: {folder}: expected sources for {blocks} blocks, got {len(found)}")
    return torch.tensor(found)


@dataclass(frozen=True)
class Recall:
    """Keys with values that stand somewhere in a context, one of them asked for at its end: ``prompts`` int64
    ``[N, T]`` end with the key, ``answers`` int64 ``[N, A]`` are the value's tokens."""

    prompts: Tensor
    answers: Tensor


def recall_in_code(tokenizer: Tokenizer, samples: int, context: int, pairs: int = 4) -> Recall:
    """Assignments of a random number to a random name at varying depth in held-out code; one of them is repeated up to
    its value. Prompts are ``context`` tokens; all values have as many tokens."""
    rng = random.Random(0)
    start = tokenizer.encode("")  # what the tokenizer puts before a text
    code = [tokenizer.encode(path.read_text(encoding="utf-8"))[len(start) :] for path in heldout_files()]
    code = [ids for ids in code if len(ids) >= context]

    def pair() -> tuple[list[int], list[int], list[int]]:
        """A line, its tokens up to the value, the value's."""
        name, value = "".join(rng.choices(string.ascii_lowercase, k=8)), rng.randrange(1000, 10000)
        asked, line, whole = (
            tokenizer.encode(f"\n{name} ={end}")[len(start) :] for end in ("", f" {value}\n", f" {value}")
        )
        shared = next(i for i, token in enumerate([*asked, -1]) if token != whole[i])
        return line, whole[:shared], whole[shared:]

    length = len(pair()[2])
    prompts, answers = [], []
    for i in range(samples):
        drawn: list[tuple[list[int], list[int], list[int]]] = []
        while len(drawn) < pairs:
            one = pair()
            drawn += [one] if len(one[2]) == length else []
        _, asked, answer = drawn[0]
        room = context - sum(len(line) for line, _, _ in drawn) - len(asked) - len(start)
        filler = rng.choice(code)[:room]
        places = [int((i + 0.5) / samples * room)] + [rng.randrange(room) for _ in drawn[1:]]
        for place, (line, _, _) in sorted(zip(places, drawn, strict=True), key=lambda x: -x[0]):
            filler[place:place] = line
        prompts.append([*start, *filler, *asked])
        answers.append(answer)
    return Recall(torch.tensor(prompts), torch.tensor(answers))


def recall_of_tokens(vocabulary: int, samples: int, context: int, pairs: int = 8, length: int = 4) -> Recall:
    """The same of plain tokens, for a model without a tokenizer: fillers are of the lower half of the vocabulary, every
    key and the ``length`` tokens of its value of the upper half, each used once a sample. The first token is a filler.

    Raises:
        ValueError: the vocabulary or the context is too small for so many pairs.
    """
    generator = torch.Generator().manual_seed(0)
    half = vocabulary // 2
    prompts = torch.randint(0, half, (samples, context), generator=generator)
    answers = torch.empty(samples, length, dtype=torch.int64)
    if pairs * (length + 1) > vocabulary - half or pairs * (length + 1) + 2 > context:
        raise ValueError(f"recall_of_tokens: pairs: expected fewer, got {pairs} of {length + 1} tokens")
    for i in range(samples):
        used = half + torch.randperm(vocabulary - half, generator=generator)[: pairs * (length + 1)]
        stretches = used.view(pairs, length + 1)
        # Pair p stands in the p-th part of the context; the one that is asked for goes through all depths.
        part = (context - 2) // pairs
        for p in range(pairs):
            at = p * part + int(torch.randint(1, part - length + 1, (), generator=generator))
            prompts[i, at : at + length + 1] = stretches[p]
        asked = i * pairs // samples
        prompts[i, -1], answers[i] = stretches[asked, 0], stretches[asked, 1:]
    return Recall(prompts, answers)


def passkeys(
    tokenizer: Tokenizer, filler: Tensor, context: int, *, seed: int, pairs: int = 4, words: int = 8
) -> tuple[Tensor, Tensor]:
    """Passkeys of random words assigned at sorted random depths of a filler, and all of them assigned again at its end.

    DuoAttention's training data (arXiv 2410.10819, section 2.2) with fewer and shorter keys.

    Args:
        filler: int64 ``[n]``, the text around them; its first tokens are taken.
        context: tokens in all, rounded down to a multiple of 16.

    Returns:
        tokens int64 ``[1, T]`` and which of them are a repeated value, bool ``[1, T]``.

    Raises:
        ValueError: the context has no room for them, or the filler is too short for it.
    """
    rng = random.Random(seed)
    start = tokenizer.encode("")

    def bare(text: str) -> list[int]:
        return tokenizer.encode(text)[len(start) :]

    keys = [" ".join(rng.choices(SPELLING, k=words)) for _ in range(pairs)]
    lines = [bare(f'\npasskey_{name} = "{key}"\n') for name, key in zip(ORDINALS, keys, strict=False)]
    asked = [bare(f"\npasskey_{name} =") for name, _ in zip(ORDINALS, keys, strict=False)]
    room = context // 16 * 16 - len(start) - 2 * sum(map(len, lines))
    if not 0 < room <= len(filler) or pairs > len(ORDINALS):
        raise ValueError(
            f"passkeys: context: expected room for {pairs} keys (at most {len(ORDINALS)}) twice and {room} tokens of "
            f"filler, got {context} and {len(filler)}"
        )
    code = filler[:room].tolist()
    for place, line in sorted(zip(sorted(rng.uniform(0.05, 0.95) for _ in keys), lines, strict=True), reverse=True):
        code[int(place * room) : int(place * room)] = line
    tokens, supervised = [*start, *code], [False] * (len(start) + len(code))
    for line, question in zip(lines, asked, strict=True):
        tokens += line
        supervised += [False] * len(question) + [True] * (len(line) - len(question))
    return torch.tensor([tokens]), torch.tensor([supervised])
