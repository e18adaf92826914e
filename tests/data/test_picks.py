"""Picks are what a list of (file, trajectory) is, without the list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ttcfast.data.picks import Picks

INDICES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=30)


@given(index=INDICES, start=st.integers(0, 35), stop=st.integers(0, 35))
def test_they_are_what_the_list_is(index, start, stop):
    picks = Picks.of(index)
    assert list(picks) == index == [picks[i] for i in range(len(picks))] and len(picks) == len(index)
    assert picks[-1] == index[-1]
    assert list(picks.part(start, stop)) == index[start:stop]


@given(index=INDICES)
def test_in_turn_every_file_comes_first_before_any_comes_again(index):
    place, order = {}, []
    for pick, (file, _) in enumerate(index):
        place[file] = place.get(file, -1) + 1
        order.append((place[file], pick))
    wanted = [pick for _, pick in sorted(order)]
    assert Picks.of(index).in_turn(range(len(index))) == wanted
    assert Picks.of(index).in_turn(reversed(range(len(index)))) == wanted[::-1]


def test_a_billion_take_no_memory():
    picks = Picks([(0, 0, 10**9), (1, 0, 3), (2, 5, 10**9)])
    assert len(picks) == 2 * 10**9 + 3 and len(picks.runs) == 3
    assert picks[10**9 + 4] == (2, 6) and picks[-1] == (2, 10**9 + 4)
    assert picks.part(10, 10**9 + 2).runs == ((0, 10, 10**9 - 10), (1, 0, 2))
    assert [picks[i] for i in picks.in_turn([0, 1, 2, 8, 9, 10, 11, len(picks) - 1])] == [
        *((0, 0), (1, 0), (2, 5), (2, 7), (0, 3), (2, 8), (0, 4)),
        (2, 10**9 + 4),
    ]
