"""The memtable shows what was applied, over what lies below, whatever is frozen in between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import BadArgument
from storage.metadata.memtable import Layer, Memtable
from storage.metadata.records import Op


class DictBase:
    """Stands for LMDB."""

    def __init__(self) -> None:
        self.content: dict[bytes, bytes] = {}

    def get(self, key: bytes) -> bytes | None:
        return self.content.get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self.content.get(key) for key in keys]

    def row(self, first: bytes, last: bytes, count: int) -> list[bytes] | None:
        found = list(self.pairs(first, last + b"\0", False))
        return [value for _, value in found] if len(found) == count and (found[0][0], found[-1][0]) == (first, last) else None

    def pairs(self, start: bytes, stop: bytes, reverse: bool) -> Iterator[tuple[bytes, bytes]]:
        for key in sorted(self.content, reverse=reverse):
            if start <= key < stop:
                yield key, self.content[key]

    def scan(self, start: bytes, stop: bytes, limit: int, reverse: bool = False) -> list[tuple[bytes, bytes]]:
        return list(self.pairs(start, stop, reverse))[: max(limit, 0)]

    def absorb(self, layer: Layer) -> None:
        for key in layer.ordered():
            value = layer.values[key]
            if value is None:
                self.content.pop(key, None)
            else:
                self.content[key] = value


keys = st.binary(min_size=1, max_size=2).map(lambda raw: bytes(byte % 4 for byte in raw))
ops = st.lists(st.tuples(keys, st.none() | st.binary(max_size=3)), max_size=6)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("apply"), ops),
        st.tuples(st.sampled_from(["take", "freeze", "absorb"]), st.none()),
        st.tuples(st.just("scan"), st.tuples(keys, keys, st.integers(-1, 5), st.booleans())),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(steps)
def test_reads_equal_a_dict_whatever_is_taken_frozen_and_absorbed(plan: list[tuple[str, Any]]) -> None:
    base = DictBase()
    table = Memtable(base)
    now: dict[bytes, bytes] = {}
    committed: dict[bytes, bytes] = {}

    def update(model: dict[bytes, bytes], changes: list[Op]) -> None:
        for key, value in changes:
            model.pop(key, None)
            if value is not None:
                model[key] = value

    for step, argument in plan:
        if step == "apply":
            table.apply(argument)
            update(now, argument)
        elif step == "take":
            update(committed, table.take())
            assert committed == now
        elif step == "freeze" and table.frozen is None:
            table.freeze(1)
        elif step == "absorb" and table.frozen is not None:
            base.absorb(table.frozen)
            table.drop_frozen()
        elif step == "scan":
            start, stop, limit, reverse = argument
            expected = sorted(((k, v) for k, v in now.items() if start <= k < stop), reverse=reverse)
            assert table.scan(start, stop, limit, reverse) == expected[: max(limit, 0)]
        # What a commit of it takes, however often a key was put: else what cannot be committed for a while never could be.
        assert table.pending_bytes == sum(16 + len(key) + len(value or b"") for key, value in table.pending.items())
        looked_for = sorted({*now, *committed, b"\0", b"\1\1"}, reverse=True)
        for key in looked_for:
            assert table.get(key) == now.get(key)
        assert table.get_many([*looked_for, *looked_for]) == [now.get(key) for key in [*looked_for, *looked_for]]
    # What is below and what is frozen is committed, and nothing else: a takeover never gives LMDB a change that is not durable.
    if table.frozen is None:
        table.freeze(2)
    else:
        base.absorb(table.frozen)
        table.drop_frozen()
        table.freeze(2)
    assert table.frozen is not None
    base.absorb(table.frozen)
    assert base.content == committed


@pytest.mark.parametrize("op", [(b"", b"x"), (b"k" * 501, b"x"), (b"k" * 501, None), (b"k", bytes(16 * 1024 * 1024 + 1))])
def test_a_batch_with_an_impossible_key_or_value_changes_nothing(op: Op) -> None:
    table = Memtable(DictBase())
    with pytest.raises(BadArgument):
        table.apply([(b"good", b"1"), op])
    assert table.get(b"good") is None
    assert table.take() == []
