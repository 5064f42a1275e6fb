"""The Python blocks of the documentation run, and its drafters leave the output as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from effops import decoding, models
from effops.cache import TreeNodes
from effops.models import shipped
from strategies.cached import ancestor_bits
from strategies.drafting import check_lossless
from strategies.values import int32

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


@pytest.fixture(scope="module")
def caches() -> dict[str, Any]:
    """What the names of docs/caches.md are at its end."""
    return run("docs/caches.md", {})


def test_exact_caches_of_the_page_say_what_they_should(caches):
    prompt, expected, continued = (caches[name] for name in ("prompt", "expected", "continued"))
    assert caches["again"] == expected[1:] and caches["dense"].lengths == [432]
    paged, tree = caches["paged"], caches["tree"]
    assert paged.lengths == [400, 400] and paged.free_pages == 64 - 25
    assert caches["held"] == 400 and tree.kept_pages == 25 and tree.lengths == [0, len(caches["question"])]
    alone = caches["model"](torch.tensor([caches["question"]]), caches["model"].new_cache(1, 512), logits_to_keep=1)
    assert torch.allclose(caches["answer"][1], alone[0], atol=1e-3)
    for name in ("StreamingKVCache", "DuoKVCache"):  # a window that holds everything
        options = {} if name == "StreamingKVCache" else {"full_heads": caches["full_heads"]}
        kv = getattr(caches["cache"], name)(*caches["sizes"], window=512, **options)
        assert continued(kv, prompt) == expected
    assert caches["endless"].lengths == [2560] and caches["model"].config.context_length == 2048


def test_the_pages_bytes(caches):
    """The formulas of its table: R, labels, rings."""
    c = caches["model"].config
    heads = c.num_hidden_layers * c.num_key_value_heads
    row, label = heads * 2 * c.head_dim * 4, heads * 16 * 4 // 8
    full = int(caches["full_heads"].sum()) / heads
    assert caches["dense"].nbytes == 512 * row and caches["paged"].nbytes == 64 * 16 * row
    assert caches["streaming"].nbytes == caches["endless"].nbytes == 336 * row
    assert caches["duo"].nbytes == (full * 2048 + (1 - full) * 336) * row
    assert caches["labelled"].nbytes == 512 * (row + label)
    assert caches["quest"].nbytes == 512 * (row + row // 2 * 2 // 16)  # keys are half of a row
    assert caches["offloaded"].file_nbytes == 512 * row
    assert caches["offloaded"].nbytes == 512 * label + 2 * 128 * row / c.num_hidden_layers
    for name, held, slots in (("h2o", 128, 128), ("snapkv", 159, 128 + 64)):
        assert caches[name].held == [held] and caches[name].nbytes == slots * (row + 8 * heads)
    assert caches["merged"].held == [40 + 54 + 31] and caches["merged"].nbytes == 512 * row
    assert 0 < caches["offloaded"].traffic.hit_rate < 1


@pytest.mark.parametrize(
    "name, back, refused",
    [("dense", 0, None), ("paged", 0, None), ("tree", 0, None), ("labelled", 0, None), ("quest", 0, None),
     ("offloaded", 0, None),
     ("streaming", 64, 90), ("duo", 64, 90), ("h2o", 0, 1), ("snapkv", 31, 32), ("merged", 31, 32)],
)  # fmt: skip
def test_the_pages_refusals(caches, name, back, refused):
    """A rollback of so many tokens is taken or, where the table says so, refused; trees by evicting ones alone."""
    kv = caches[name]
    lengths = list(kv.lengths)
    kv.rollback([max(0, n - back) for n in lengths])
    if refused is None:
        kv.rollback([n // 2 for n in lengths])
    else:
        with pytest.raises(ValueError, match=f"{type(kv).__name__}: lengths: expected"):
            kv.rollback([n - refused for n in lengths])
    nodes = TreeNodes(ancestor_bits([-1, 0])[None], int32(0, 1)[None], 1)
    if name in ("h2o", "snapkv", "merged"):
        with pytest.raises(ValueError, match=f"{type(kv).__name__}: tree: expected None"):
            kv.plan(2, None, nodes)
    else:
        assert kv.plan(2, None, nodes).tree is nodes


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


def test_the_blocks_about_processing_in_memory_run(capsys):
    names = run("docs/pim.md", {})
    assert names["logits"].shape[:2] == (1, 3) and names["result"].finished == 200
    assert names["step"].tokens_per_second > 1000 and capsys.readouterr().out.strip()


def test_links_lead_somewhere():
    for file in ("README.md", "docs/pim.md", "docs/caches.md", "docs/decoding.md", "docs/systems/README.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / file).read_text()):
            assert target.startswith("https://") or (ROOT / file).parent.joinpath(target).exists(), target
