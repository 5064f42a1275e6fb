"""Who computes what and where: the published algorithms, by hand and by their laws."""

from __future__ import annotations

import itertools

import pytest
from effops import _host
from effops.pim import System
from hypothesis import given
from hypothesis import strategies as st

pim = _host.pim
lengths = st.lists(st.integers(1, 2048), min_size=1, max_size=40)


@pytest.mark.parametrize("length, cycles", [(64, 7624), (512, 12776), (513, 19832), (1024, 25352)])
def test_estimate_of_a_request_by_hand(length: int, cycles: int) -> None:
    """NeuPIMs algorithm 1 for GPT-3 7B over four devices: eight heads of 128."""
    assert System("gpt3-7b", "neupims", tensor=4)._system.estimate_attention(length) == cycles


@given(lengths, st.integers(1, 33))
def test_greedy_packing_keeps_its_bound(costs: list[int], channels: int) -> None:
    """Algorithm 2 in order of descending cost: at most 4/3 - 1/(3m) of the best (Graham 1969)."""
    to, loads, _ = pim.pack_min_load(costs, [0] * channels)
    assert [sum(c for c, t in zip(costs, to, strict=True) if t == i) for i in range(channels)] == list(loads)
    assert max(loads) <= sum(costs) / channels + (1 - 1 / channels) * max(costs) + 1e-9  # of any greedy packing
    if len(costs) <= 7:
        assert max(loads) <= (4 / 3 - 1 / (3 * channels)) * _optimum(costs, channels) + 1e-9


@given(lengths, st.integers(1, 9), st.integers(1, 3000))
def test_packing_keeps_to_the_room_of_channels(sizes: list[int], channels: int, room: int) -> None:
    """Nobody is placed beyond it, nobody waits beside room for it, and with enough of it nothing changes."""
    for to, free in (
        pim.pack_min_load(sizes, [0] * channels, sizes, [room] * channels)[::2],
        pim.pack_round_robin(len(sizes), channels, 0, sizes, [room] * channels),
    ):
        for c in range(channels):
            assert free[c] == room - sum(n for n, t in zip(sizes, to, strict=True) if t == c) >= 0
        assert all(t >= 0 or n > max(free) for n, t in zip(sizes, to, strict=True))
    enough = [sum(sizes)] * channels
    assert pim.pack_min_load(sizes, [0] * channels, sizes, enough)[0] == pim.pack_min_load(sizes, [0] * channels)[0]
    turns = pim.pack_round_robin(len(sizes), channels, 2, sizes, enough)[0]
    assert turns == pim.pack_round_robin(len(sizes), channels, 2)[0] == [(2 + i) % channels for i in range(len(sizes))]


def test_packing_by_room_by_hand() -> None:
    """The least loaded channel has no room for the second; the last finds none."""
    assert pim.pack_min_load([9, 5, 1], [0, 1], [60, 50, 70], [60, 80])[0] == [0, 1, -1]
    assert pim.pack_min_load([9, 5], [0, 20], [60, 50], [60, 80])[0] == [0, 1]
    assert pim.pack_round_robin(3, 2, 0, [10, 10, 10], [20, 5])[0] == [0, 0, -1]


def _optimum(costs: list[int], channels: int) -> int:
    best = sum(costs)
    for to in itertools.product(range(min(channels, len(costs))), repeat=len(costs)):
        best = min(best, max(sum(c for c, t in zip(costs, to, strict=True) if t == i) for i in set(to)))
    return best


def test_packing_adds_to_what_channels_have() -> None:
    to, loads, _ = pim.pack_min_load([5, 9, 5], [0, 7, 1])
    assert to == [2, 0, 2] and list(loads) == [9, 7, 11]


@given(st.lists(st.integers(0, 7), max_size=60))
def test_halves_cover_every_channel_evenly(channel: list[int]) -> None:
    """Algorithm 3: sizes differ by at most one, in all and in each channel."""
    half = pim.halve_batch(channel, 8)
    assert set(half) <= {0, 1} and len(half) == len(channel)
    assert abs(sum(half) * 2 - len(half)) <= 1
    for c in range(8):
        of = [h for h, x in zip(half, channel, strict=True) if x == c]
        assert abs(2 * sum(of) - len(of)) <= 1 and of == sorted(of)


@given(lengths)
def test_the_longer_half_of_all_requests(sizes: list[int]) -> None:
    half = pim.halve_by_length(sizes)
    long, short = ([n for n, h in zip(sizes, half, strict=True) if h == k] for k in (0, 1))
    assert 0 <= len(long) - len(short) <= 1 and min(long) >= max(short, default=0)


@st.composite
def experts(draw) -> tuple[list[int], list[float], list[float]]:
    tokens = draw(st.lists(st.integers(0, 60), min_size=1, max_size=10))
    on_processor = [0.0 if n == 0 else max(1.0, n / 200) for n in tokens]
    near = [0.0 if n == 0 else max(0.25, n / 24) for n in tokens]
    return tokens, on_processor, near


@given(experts(), st.sampled_from([0, 2, 4]))
def test_experts_are_divided_at_the_best_prefix(case, sections: int) -> None:
    """Never slower than either processor alone, equal to the best of all prefixes, sections in one piece."""
    tokens, on_processor, near = case
    ns, processor_ns, near_ns, is_near = pim.split_experts(tokens, on_processor, near, sections)
    assert ns == pytest.approx(max(processor_ns, near_ns))
    assert ns <= min(sum(on_processor), sum(near)) + 1e-9
    units = min(sections, len(tokens)) if sections else len(tokens)
    groups = [range(u, len(tokens), units) for u in range(units)]
    assert all(len({is_near[e] for e in g}) == 1 for g in groups)
    order = sorted(range(units), key=lambda u: sum(tokens[e] for e in groups[u]))
    best = min(
        max(
            sum(on_processor[e] for u in order[j:] for e in groups[u]),
            sum(near[e] for u in order[:j] for e in groups[u]),
        )
        for j in range(units + 1)
    )
    assert ns == pytest.approx(best)


@given(experts(), st.floats(1, 1.5), st.floats(1, 1.5))
def test_sides_that_slow_each_other_are_never_faster(case, near_factor: float, factor: float) -> None:
    """Slower than without, and still no slower than either side alone."""
    tokens, on_processor, near = case
    plain = pim.split_experts(tokens, on_processor, near, 0)
    slowed = pim.split_experts(tokens, on_processor, near, 0, [n * near_factor for n in near], factor)
    assert plain[0] - 1e-9 <= slowed[0] <= min(sum(on_processor), sum(near)) + 1e-9
    assert slowed[0] <= max(near_factor, factor) * plain[0] + 1e-9


def test_sides_beside_each_other_by_hand() -> None:
    """The near side, done after 2 x 1.5, slows the processor from 5 to 5 + 3 - 3 / 1.2 meanwhile."""
    ns, processor, near, is_near = pim.split_experts([1, 9], [3.0, 5.0], [2.0, 9.0], 0, [3.0, 13.5], 1.2)
    assert (ns, processor, near) == pytest.approx((5.5, 5.5, 3.0)) and is_near == [True, False]


def test_sections_are_the_bundles_of_a_near_processor() -> None:
    for name, sections in (("duplex", 4), ("bank_pim", 0), ("neupims", 0)):
        system = System("mixtral-8x7b", name, tensor=4)._system
        assert [system.sections(n) for n in (1, 4, 5, 64)] == [0, 0, sections, sections]


def test_experts_by_hand() -> None:
    """An expert's weights stream once on the processor, in a quarter of it near while tokens are few."""
    tokens = [40, 12, 6, 4, 2, 0, 0, 0]
    near = [0.0 if n == 0 else max(1, 0.75 * n / 8) / 4 for n in tokens]
    on_processor = [0.0 if n == 0 else 1.0 for n in tokens]
    ns, _, _, is_near = pim.split_experts(tokens, on_processor, near, 0)
    assert ns == pytest.approx(1.03125) and is_near == [False, *[True] * 7]
