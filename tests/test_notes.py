"""Notes for `status`: each once, the last ones, until what they tell of is put right."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from storage.sectors.notes import KEPT, Notes

ABOUT = st.tuples(st.integers(1, 3), st.integers(0, 2))


@given(st.lists(st.tuples(st.booleans(), ABOUT, st.integers(0, 60)), max_size=150))
def test_the_last_of_what_is_still_so_each_once(steps: list[tuple[bool, tuple[int, int], int]]) -> None:
    notes, expected = Notes(), list[tuple[str, tuple[int, int]]]()
    for adds, about, number in steps:
        if adds:
            text = f"{about}: {number}"
            notes.add(text, *about)
            if (text, about) not in expected:
                expected = [*expected, (text, about)][-KEPT:]
        else:
            notes.settle(*about)
            expected = [one for one in expected if one[1] != about]
        assert list(notes) == [text for text, _ in expected]
