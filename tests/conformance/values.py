"""What every implementation of `storage.interfaces.Values` promises. Each check gets an empty one, its store, and how to die and come
back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from storage.errors import NotFound
from storage.interfaces import Batch, MetadataStore, Values

#: kill -9 and the next process: the values then.
Again = Callable[[], Awaitable[tuple[Values, MetadataStore]]]


def make(values: Values, store: MetadataStore) -> int:
    batch = Batch()
    value = values.create(batch, 1, "1")
    store.apply(batch)
    return value


async def append(values: Values, value: int, data: bytes) -> int:
    await values.reserve(value, len(data))
    return values.append_now(value, data)


async def what_is_appended_can_be_read(values: Values, store: MetadataStore, again: Again) -> None:
    value = make(values, store)
    assert values.size_of(value) == 0
    assert await values.read(value, 0, 10) == b""
    assert await append(values, value, b"one") == 0
    assert await append(values, value, b"two") == 3
    assert values.size_of(value) == 6
    assert await values.read(value, 2, 2) == b"et"
    assert await values.read(value, 5, 100) == b"o"
    assert await values.read(value, 6, 1) == b""
    assert values.replication_of(value) == "1"


async def ids_are_never_given_twice(values: Values, store: MetadataStore, again: Again) -> None:
    one = make(values, store)
    await store.commit()
    values, store = await again()
    assert make(values, store) != one


async def what_is_committed_survives_and_the_rest_is_a_prefix(values: Values, store: MetadataStore, again: Again) -> None:
    value = make(values, store)
    await append(values, value, b"a" * 1000)
    await values.commit(value)
    await append(values, value, b"b" * 1000)
    values, store = await again()
    assert values.size_of(value) in (1000, 2000)
    assert await values.read(value, 0, 5000) == (b"a" * 1000 + b"b" * 1000)[: values.size_of(value)]


async def commit_all_is_for_all(values: Values, store: MetadataStore, again: Again) -> None:
    made = [make(values, store) for _ in range(5)]
    for value in made:
        await append(values, value, b"%d" % value)
    await values.commit_all()
    values, store = await again()
    assert [await values.read(value, 0, 100) for value in made] == [b"%d" % value for value in made]


async def a_tail_handed_over_with_a_batch_is_in_its_commit(values: Values, store: MetadataStore, again: Again) -> None:
    value = make(values, store)
    await append(values, value, b"renamed content")
    await values.settle(value, values.size_of(value))
    batch = Batch()
    batch.put(b"wtest", b"x")
    store.apply(batch, values.uncommitted_tail(value))
    assert values.uncommitted_tail(value) == []
    await store.commit()
    values, store = await again()
    assert store.get(b"wtest") == b"x"
    assert await values.read(value, 0, 100) == b"renamed content"


async def a_freed_value_is_gone_now_and_later(values: Values, store: MetadataStore, again: Again) -> None:
    value = make(values, store)
    await append(values, value, b"x" * 100)
    await values.commit(value)
    batch = Batch()
    values.free(batch, value)
    store.apply(batch)
    with pytest.raises(NotFound):
        values.size_of(value)
    with pytest.raises(NotFound):
        await values.read(value, 0, 1)
    await store.commit()
    values, store = await again()
    with pytest.raises(NotFound):
        values.size_of(value)


async def a_tail_is_at_hand(values: Values, store: MetadataStore, again: Again) -> None:
    value = make(values, store)
    await append(values, value, b"x" * 100)
    assert values.local_at(value, 99)
    assert values.accepting()


async def flush_leaves_the_bytes_where_they_are_read(values: Values, store: MetadataStore, again: Again) -> None:
    value = make(values, store)
    await append(values, value, b"x" * 100_000)
    report = await values.flush()
    assert report.degraded_sectors == 0
    assert await values.read(value, 99_990, 100) == b"x" * 10
    values, store = await again()
    assert await values.read(value, 0, 200_000) == b"x" * 100_000


CHECKS = [
    what_is_appended_can_be_read,
    ids_are_never_given_twice,
    what_is_committed_survives_and_the_rest_is_a_prefix,
    commit_all_is_for_all,
    a_tail_handed_over_with_a_batch_is_in_its_commit,
    a_freed_value_is_gone_now_and_later,
    a_tail_is_at_hand,
    flush_leaves_the_bytes_where_they_are_read,
]
