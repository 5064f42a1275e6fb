"""Recall tasks have one right answer, which stands where it is said to; texts are what they are said to be."""

from __future__ import annotations

import re

import pytest
import torch
from effops.models import Tokenizer, shipped
from effops.systems import texts
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("tokenizers", reason="texts are read through the shipped model's tokenizer")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(shipped.model_dir())


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 5), st.integers(0, 200))
def test_a_key_of_tokens_has_one_value(samples, pairs, length, more):
    context = pairs * (length + 2) + 2 + more
    task = texts.recall_of_tokens(2 * pairs * (length + 1), samples, context, pairs, length)
    assert task.prompts.shape == (samples, context) and task.answers.shape == (samples, length)
    for prompt, answer in zip(task.prompts.tolist(), task.answers.tolist(), strict=True):
        first, last = (i for i, token in enumerate(prompt) if token == prompt[-1])
        assert last == context - 1 and prompt[first + 1 : first + 1 + length] == answer
        special = [token for token in prompt if token >= pairs * (length + 1)]
        assert len(special) == pairs * (length + 1) + 1 and len(set(special)) == len(special) - 1


def test_all_depths_are_asked_for():
    task = texts.recall_of_tokens(256, 32, 1000)
    first = [row.index(row[-1]) for row in task.prompts.tolist()]
    assert first == sorted(first) or all(abs(a - b) < 125 for a, b in zip(first, sorted(first), strict=True))
    assert min(first) < 125 and max(first) > 875 - 5


def test_too_many_pairs():
    with pytest.raises(ValueError, match="recall_of_tokens: pairs: expected fewer, got 8 of 5 tokens"):
        texts.recall_of_tokens(64, 1, 1000)
    with pytest.raises(ValueError, match="recall_of_tokens: pairs: expected fewer"):
        texts.recall_of_tokens(256, 1, 40)


def test_numbers_are_assigned_in_code(tokenizer):
    task = texts.recall_in_code(tokenizer, 6, 128)
    assert task.prompts.shape == (6, 128) and len(task.answers) == 6
    for prompt, answer in zip(task.prompts.tolist(), task.answers.tolist(), strict=True):
        text, value = tokenizer.decode(prompt), tokenizer.decode(answer)
        name = re.search(r"\n(\w+) =$", text)[1]
        assert re.findall(rf"\n{name} = (\d+)\n", text) == [value.strip()] and text.count(name) == 2


def test_training_like_text_is_not_held_out(tokenizer):
    blocks = texts.training_like(tokenizer, 5, 64)
    assert blocks.shape == (5, 64) and blocks.dtype == torch.int64
    held_out = "\n".join(path.read_text() for path in shipped.heldout_files())
    assert not any(tokenizer.decode(block)[20:120] in held_out for block in blocks.tolist())
    with pytest.raises(ValueError, match=r"training_like: .*: expected sources for 5 blocks, got 0"):
        texts.training_like(tokenizer, 5, 10**6)


def test_held_out_text_has_whole_rows(tokenizer):
    rows = texts.held_out(tokenizer, 2048)
    assert len(rows) >= 16 and rows.shape[1] == 2048
    first = next(p for p in shipped.heldout_files() if len(tokenizer.encode(p.read_text())) >= 2048)
    assert first.read_text().startswith(tokenizer.decode(rows[0].tolist())[:1000])


def test_passkeys_are_asked_for_in_the_end(tokenizer):
    filler = texts.training_like(tokenizer, 1, 600)[0]
    (row,), (supervised,) = texts.passkeys(tokenizer, filler, 500, seed=3, pairs=3)
    assert len(row) == len(supervised) == 496
    text = tokenizer.decode(row.tolist())
    keys = re.findall(r'\npasskey_(\w+) = "([a-z ]+)"\n', text)
    assert [name for name, _ in keys] == 2 * ["first", "second", "third"] and keys[:3] == keys[3:]
    assert all(len(key.split()) == 8 for _, key in keys)
    said = tokenizer.decode(row[supervised].tolist())
    assert said == "".join(f' "{key}"\n' for _, key in keys[3:])
    assert not supervised[: -len(tokenizer.encode(text[text.index("passkey_third") :]))].any()
    other = texts.passkeys(tokenizer, filler, 500, seed=4, pairs=3)[0]
    assert not other.equal(row[None])
    for context, length, pairs in ((100, 600, 4), (700, 300, 4), (900, 600, 11)):
        with pytest.raises(ValueError, match=r"passkeys: context: expected room for \d+ keys"):
            texts.passkeys(tokenizer, filler[:length], context, seed=0, pairs=pairs)
