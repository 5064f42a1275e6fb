"""The Python blocks of the documentation run, and its drafters leave the output as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from effops import decoding, models
from effops.models import shipped
from strategies.drafting import check_lossless

pytest.importorskip("tokenizers", reason="the shipped model's text needs the tokenizers library")

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[str]:
    """The page's blocks, each behind as many empty lines as make its line numbers the page's."""
    text = (ROOT / page).read_text()
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in FENCE.finditer(text)]


def run(page: str, names: dict[str, Any], which: slice = slice(None)) -> dict[str, Any]:
    found = blocks(page)[which]
    assert found
    for block in found:
        exec(compile(block, str(ROOT / page), "exec"), names)
    return names


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the names of docs/decoding.md are at its end."""
    return run("docs/decoding.md", {})


@pytest.fixture(scope="module")
def exact() -> models.Llama:
    """The shipped model in float32, where speculative and plain decoding are the same."""
    return models.load(shipped.model_dir(), dtype=torch.float32)[0]


def test_the_page_prints_what_it_says(page):
    assert page["result"].stats.new_tokens == 48 and page["result"].stats.mean_accepted_length > 1
    assert sorted(page["times"]) == [1, 4, 8, 16, 32] and 1 <= len(page["tree"]) <= 32


@pytest.mark.parametrize("name", ["copies", "a model", "heads", "bigrams"])
def test_drafters_of_the_page_are_lossless(page, exact, name):
    heads, small = (part.float() for part in (page["heads"], page["small"]))
    drafter = {
        "copies": lambda: decoding.CopyDrafter(),
        "a model": lambda: decoding.ModelDrafter(small, length=3),
        "heads": lambda: decoding.MedusaDrafter(heads),
        "bigrams": page["BigramDrafter"],
    }[name]()
    tokenizer = page["tokenizer"]
    prompts = [tokenizer.encode(text) for text in (page["prompt"], "import re\n\n\ndef tokens(text):\n")]
    got = check_lossless(exact, prompts, drafter, max_new_tokens=48, tokenizer=tokenizer)
    assert got.stats.mean_accepted_length > 1.05


def test_the_drafter_of_the_page_is_about_twenty_lines(page):
    (block,) = (block for block in blocks("docs/decoding.md") if "class BigramDrafter" in block)
    body = block[block.index("class") : block.index("result =")]
    assert len([line for line in body.splitlines() if line.strip()]) <= 20


def test_the_readmes_blocks(capsys):
    """A decode step over a cache, and a checkpoint. The block between them needs a Transformers checkpoint."""
    found = blocks("README.md")
    step = next(i for i, block in enumerate(found) if "append_kv" in block)
    load = next(i for i, block in enumerate(found) if "models.load" in block)
    k_cache, v_cache = torch.zeros(2, 8, 2, 4), torch.zeros(2, 8, 2, 4)
    names = {
        "q": torch.ones(2, 1, 4, 4), "k": torch.ones(2, 1, 2, 4), "v": torch.full((2, 1, 2, 4), 3.0),
        "k_cache": k_cache, "v_cache": v_cache, "kv_lens": torch.tensor([1, 1], dtype=torch.int32),
        "slots": torch.tensor([[0], [0]], dtype=torch.int32),
    }  # fmt: skip
    run("README.md", names, slice(step, step + 1))
    assert torch.equal(names["out"], torch.full((2, 1, 4, 4), 3.0)) and bool((k_cache[:, 0] == 1).all())
    run("README.md", {"directory": shipped.model_dir()}, slice(load, load + 1))
    assert capsys.readouterr().out.strip()


def test_links_lead_somewhere():
    for file in ("README.md", "docs/decoding.md", "docs/systems/README.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / file).read_text()):
            assert target.startswith("https://") or (ROOT / file).parent.joinpath(target).exists(), target
