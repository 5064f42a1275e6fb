"""Stop strings in every way of cutting the stream into pieces."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from effops.decoding import StopStrings


def run(stops, pieces):
    checker, shown = StopStrings(stops), []
    for piece in pieces:
        text, stopped = checker.push(piece)
        shown.append(text)
        if stopped:
            return "".join(shown), True
    return "".join(shown) + checker.flush(), False


def cuts(text, most=3):
    for count in range(most + 1):
        for places in combinations(range(1, len(text)), count):
            edges = [0, *places, len(text)]
            yield [text[a:b] for a, b in pairwise(edges)]


@pytest.mark.parametrize(
    "stops, text, shown, stopped",
    [
        (["END"], "abcENDxyz", "abc", True),
        (["END"], "abcEN", "abcEN", False),
        (["aab"], "aaab", "a", True),
        (["\n\n"], "x\ny\n\nz", "x\ny", True),
        (["abab"], "ababab", "", True),
        (["zz"], "hello", "hello", False),
        ([], "hello", "hello", False),
    ],
)
def test_every_cut_gives_the_same(stops, text, shown, stopped):
    for pieces in cuts(text):
        assert run(stops, pieces) == (shown, stopped), pieces


def test_text_appears_as_soon_as_it_can():
    checker = StopStrings(["END"])
    assert checker.push("abE") == ("ab", False)
    assert checker.push("N") == ("", False)
    assert checker.push("E") == ("EN", False)
    assert checker.push("ND!") == ("", True)


def test_the_earliest_of_several():
    assert run(["cd", "b"], ["abcd"]) == ("a", True)
