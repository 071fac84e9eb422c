"""Buffers that are lent again: never while anybody sees what is in them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import pytest

from storage.lending import Buffers

SIZE = 200_000


def address(view: memoryview) -> int:
    """Of the memory behind it."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def test_what_is_given_back_is_lent_again() -> None:
    buffers = Buffers(2 * SIZE)
    first = buffers.lend(SIZE)
    where = address(first)
    del first
    again = buffers.lend(SIZE - 10)
    assert address(again) == where
    assert len(again) == SIZE - 10
    assert not again.readonly


@pytest.mark.parametrize(
    "keep",
    [
        lambda view: view,
        lambda view: view[5:100],
        lambda view: view.toreadonly()[5:100],
        lambda view: memoryview(view.toreadonly())[7:],
        lambda view: view.cast("b"),
        lambda view: view.obj,
    ],
)
def test_nothing_that_is_kept_of_it_is_overwritten(keep: Callable[[memoryview], memoryview]) -> None:
    buffers = Buffers(2 * SIZE)
    loan = buffers.lend(SIZE)
    loan[:] = b"a" * SIZE
    kept = keep(loan)
    before = bytes(memoryview(kept))
    del loan
    for _ in range(5):
        buffers.lend(SIZE)[:] = b"b" * SIZE
    assert bytes(memoryview(kept)) == before
    del kept
    assert buffers.kept == 2 * SIZE


def test_small_things_do_not_take_large_buffers() -> None:
    """What is counted in a cache is the bytes of what is in it, not of the memory behind."""
    buffers = Buffers(2 * SIZE)
    del (loan := [buffers.lend(SIZE)])[0]
    assert buffers.kept == SIZE
    assert not loan
    small = buffers.lend(SIZE // 2)
    assert buffers.kept == SIZE
    larger = buffers.lend(2 * SIZE)
    assert buffers.kept == SIZE
    assert (len(small), len(larger)) == (SIZE // 2, 2 * SIZE)


def test_no_more_are_kept_than_so_many() -> None:
    buffers = Buffers(3 * SIZE)
    loans = [buffers.lend(SIZE) for _ in range(10)]
    assert len({address(loan) for loan in loans}) == 10
    loans.clear()
    assert buffers.kept == 3 * SIZE


def test_threads_never_have_the_same_one() -> None:
    buffers = Buffers(3 * SIZE)
    wrong: list[int] = []

    def work(mark: int) -> None:
        for _ in range(300):
            loan = buffers.lend(SIZE)
            loan[:] = bytes([mark]) * SIZE
            seen = loan.toreadonly()[100:]
            del loan
            if seen.tobytes().count(mark) != SIZE - 100:
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_larger_than_all_that_is_kept_is_lent_all_the_same() -> None:
    buffers = Buffers(SIZE)
    assert len(buffers.lend(3 * SIZE)) == 3 * SIZE
    assert buffers.kept == 0
