"""Hypothesis against a plain model: a tree of objects, bytearrays with a mask of what was written, and a copy of it all at each commit."""

from __future__ import annotations

import copy
import stat
from dataclasses import dataclass, field

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from storage.errors import BadArgument, Exists, FusefsError, IsADirectory, NotADirectory, NotEmpty, NotFound, NotPermitted
from storage.metadata.keys import COOKIE, INODE, MAP, NAME, ORPHAN
from tests.namespace_rig import ROOT, Rig, make_rig, told


@dataclass(eq=False)
class Node:
    """One inode of the model."""

    kind: str
    ino: int = 0
    nlink: int = 1
    mode: int = 0o644
    data: bytearray = field(default_factory=bytearray)
    mask: bytearray = field(default_factory=bytearray)
    target: bytes = b""
    children: dict[bytes, Node] = field(default_factory=dict)

    def grow(self, size: int) -> None:
        missing = bytes(max(0, size - len(self.data)))
        self.data += missing
        self.mask += missing


@dataclass
class World:
    """The model: a tree, and what is pinned."""

    root: Node = field(default_factory=lambda: Node("dir", ROOT, 2))
    pinned: list[Node] = field(default_factory=list)

    def dirs(self) -> list[Node]:
        found = [self.root]
        for node in found:
            found += [child for child in node.children.values() if child.kind == "dir"]
        return found

    def nodes(self) -> list[Node]:
        """Every inode with a name, once."""
        found = {id(child): child for node in self.dirs() for child in node.children.values()}
        return [self.root, *found.values()]

    def inside(self, node: Node, top: Node) -> bool:
        return node is top or any(self.inside(node, child) for child in top.children.values() if child.kind == "dir")


names = st.sampled_from([b"a", b"b", b"c", "\u00e4 \udcff".encode("utf-8", "surrogateescape")])
number = st.integers(0, 1000)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.rig: Rig = make_rig(cache_limit=3)
        trio.run(self.rig.values.commit_all)
        self.world = World()
        self.durable = copy.deepcopy(self.world)

    def pick_dir(self, n: int) -> Node:
        dirs = self.world.dirs()
        return dirs[n % len(dirs)]

    def pick_file(self, n: int) -> Node | None:
        files = [node for node in [*self.world.nodes(), *self.world.pinned] if node.kind == "file"]
        return files[n % len(files)] if files else None

    def refused(self, kind: type[FusefsError] | None) -> pytest.RaisesExc[FusefsError]:
        assert kind is not None
        return pytest.raises(kind)

    # ---- names

    @rule(n=number, name=names, kind=st.sampled_from(["file", "dir", "link"]))
    def make(self, n: int, name: bytes, kind: str) -> None:
        parent = self.pick_dir(n)

        def do() -> int:
            ns = self.rig.ns
            if kind == "dir":
                return ns.mkdir(parent.ino, name, 0o755, 0, 0)
            return ns.symlink(parent.ino, name, b"to", 0, 0) if kind == "link" else ns.create(parent.ino, name, 0o644, 0, 0)

        if name in parent.children:
            with self.refused(Exists):
                do()
            return
        node = Node(kind, do(), 2 if kind == "dir" else 1, {"file": 0o644, "dir": 0o755, "link": 0o777}[kind], target=b"to")
        parent.children[name] = node
        parent.nlink += kind == "dir"

    @rule(m=number, n=number, name=names)
    def link(self, m: int, n: int, name: bytes) -> None:
        node, parent = self.pick_file(m), self.pick_dir(n)
        if node is None:
            return
        wrong = NotFound if node.nlink == 0 else Exists if name in parent.children else None
        if wrong:
            with self.refused(wrong):
                self.rig.ns.link(node.ino, parent.ino, name)
            return
        self.rig.ns.link(node.ino, parent.ino, name)
        node.nlink += 1
        parent.children[name] = node

    @rule(n=number, name=names)
    def unlink(self, n: int, name: bytes) -> None:
        parent = self.pick_dir(n)
        node = parent.children.get(name)
        wrong = NotFound if node is None else IsADirectory if node.kind == "dir" else None
        if wrong or node is None:
            with self.refused(wrong):
                self.rig.ns.unlink(parent.ino, name)
            return
        assert self.rig.ns.unlink(parent.ino, name) == node.ino
        del parent.children[name]
        node.nlink -= 1

    @rule(n=number, name=names)
    def rmdir(self, n: int, name: bytes) -> None:
        parent = self.pick_dir(n)
        node = parent.children.get(name)
        wrong = NotFound if node is None else NotADirectory if node.kind != "dir" else NotEmpty if node.children else None
        if wrong or node is None:
            with self.refused(wrong):
                self.rig.ns.rmdir(parent.ino, name)
            return
        self.rig.ns.rmdir(parent.ino, name)
        del parent.children[name]
        parent.nlink -= 1
        node.nlink = 0

    @rule(n=number, name=names, m=number, new=names, flag=st.sampled_from(["", "", "noreplace", "exchange"]))
    def rename(self, n: int, name: bytes, m: int, new: bytes, flag: str) -> None:
        old_dir, new_dir = self.pick_dir(n), self.pick_dir(m)
        source, target = old_dir.children.get(name), new_dir.children.get(new)
        wrong = self.rename_error(source, target, old_dir, new_dir, flag)

        async def do() -> None:
            await self.rig.ns.rename(old_dir.ino, name, new_dir.ino, new, noreplace=flag == "noreplace", exchange=flag == "exchange")

        if wrong or source is None:
            with self.refused(wrong):
                trio.run(do)
            return
        trio.run(do)
        if source is target:
            return
        if flag == "exchange":
            assert target is not None
            old_dir.children[name], new_dir.children[new] = target, source
            old_dir.nlink += (target.kind == "dir") - (source.kind == "dir")
            new_dir.nlink += (source.kind == "dir") - (target.kind == "dir")
            return
        del old_dir.children[name]
        new_dir.children[new] = source
        old_dir.nlink -= source.kind == "dir"
        new_dir.nlink += source.kind == "dir"
        if target is not None:
            new_dir.nlink -= target.kind == "dir"
            target.nlink = 0 if target.kind == "dir" else target.nlink - 1

    def rename_error(self, source: Node | None, target: Node | None, old_dir: Node, new_dir: Node, flag: str) -> type[FusefsError] | None:
        if source is None or (flag == "exchange" and target is None):
            return NotFound
        if flag == "noreplace" and target is not None:
            return Exists
        if source is target:
            return None
        if source.kind == "dir" and self.world.inside(new_dir, source):
            return BadArgument
        if target is not None and flag == "exchange":
            return BadArgument if target.kind == "dir" and self.world.inside(old_dir, target) else None
        if target is not None and source.kind == "dir":
            return NotADirectory if target.kind != "dir" else NotEmpty if target.children else None
        return IsADirectory if target is not None and target.kind == "dir" else None

    @rule(m=number, mode=st.integers(0, 0o7777))
    def chmod(self, m: int, mode: int) -> None:
        nodes = self.world.nodes()
        node = nodes[m % len(nodes)]
        self.rig.ns.set_attributes(node.ino, mode=mode)
        node.mode = mode

    # ---- content

    @rule(m=number, offset=st.integers(0, 30), data=st.text("ab", min_size=1, max_size=10).map(str.encode), now=st.booleans())
    def write(self, m: int, offset: int, data: bytes, now: bool) -> None:
        node = self.pick_file(m)
        if node is None:
            return
        clash = any(i < len(node.data) and node.mask[i] and node.data[i] != byte for i, byte in enumerate(data, offset))
        if clash:
            assert not self.rig.ns.write_now(node.ino, offset, data)
            with self.refused(NotPermitted):
                trio.run(self.rig.ns.write, node.ino, offset, data)
            return
        # As the mount does.
        if not now or not self.rig.ns.write_now(node.ino, offset, data):
            trio.run(self.rig.ns.write, node.ino, offset, data)
        node.grow(offset + len(data))
        node.data[offset : offset + len(data)] = data
        node.mask[offset : offset + len(data)] = b"\1" * len(data)

    @rule(m=number, data=st.binary(min_size=1, max_size=6))
    def append(self, m: int, data: bytes) -> None:
        node = self.pick_file(m)
        if node is None:
            return
        assert trio.run(self.rig.ns.append, node.ino, data) == len(node.data)
        node.data += data
        node.mask += b"\1" * len(data)

    @rule(m=number, size=st.sampled_from([0, 0, 1, 8, 40]))
    def truncate(self, m: int, size: int) -> None:
        node = self.pick_file(m)
        if node is None:
            return
        if 0 < size < len(node.data):
            with self.refused(NotPermitted):
                self.rig.ns.truncate(node.ino, size)
            return
        self.rig.ns.truncate(node.ino, size)
        if size == 0:
            node.data, node.mask = bytearray(), bytearray()
        node.grow(size)

    # ---- lifetime and crashes

    @rule(m=number)
    def pin(self, m: int) -> None:
        node = self.pick_file(m)
        if node is not None:
            self.rig.ns.pin(node.ino)
            self.world.pinned.append(node)

    @rule(m=number)
    def unpin(self, m: int) -> None:
        if self.world.pinned:
            node = self.world.pinned.pop(m % len(self.world.pinned))
            self.rig.ns.unpin(node.ino)

    @rule()
    def commit(self) -> None:
        trio.run(self.rig.values.commit_all)
        self.durable = copy.deepcopy(World(self.world.root))

    @rule()
    def crash(self) -> None:
        self.rig = self.rig.after_crash()
        self.world = copy.deepcopy(self.durable)
        trio.run(self.rig.ns.reap_orphans)
        assert self.rig.keys(ORPHAN) == 0

    @invariant()
    def all_is_as_in_the_model(self) -> None:
        trio.run(self.compare)

    async def compare(self) -> None:
        ns = self.rig.ns
        for parent in self.world.dirs():
            # First of all, while what is not in memory has not been looked at: it is listed from the store's records.
            found_there = ns.listing(parent.ino, 0, 1000)
            listed = list(zip(found_there.names, found_there.inos, found_there.cookies, told(found_there), strict=True))
            entries = ns.entries(parent.ino, 0, 1000)
            assert listed == [(entry.name, entry.ino, entry.cookie, ns.attributes(entry.ino)) for entry in entries]
            assert all(entry.mode == stat.S_IFMT(ns.attributes(entry.ino).mode) for entry in entries)
            found = {entry.name: entry for entry in entries}
            assert {name: entry.ino for name, entry in found.items()} == {name: node.ino for name, node in parent.children.items()}
            for name, node in parent.children.items():
                assert ns.lookup(parent.ino, name) == ns.find(parent.ino, name) == node.ino
                if node.kind == "dir":
                    assert ns.parent_of(node.ino) == parent.ino
                    above = ns.path_of(parent.ino)
                    assert ns.path_of(node.ino) == (above + b"/" + name if above else name)
        everything = {id(node): node for node in [*self.world.nodes(), *self.world.pinned]}
        for node in everything.values():
            attributes = ns.attributes(node.ino)
            assert attributes.nlink == node.nlink
            assert stat.S_IMODE(attributes.mode) == node.mode if node.kind == "file" else True
            assert {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "link"}[stat.S_IFMT(attributes.mode)] == node.kind
            if node.kind == "file":
                assert (attributes.size, attributes.stored) == (len(node.data), sum(node.mask))
                assert await ns.read(node.ino, 0, 1000) == node.data
            elif node.kind == "link":
                assert ns.readlink(node.ino) == node.target
        assert ns.counts() == (len(everything), sum(sum(node.mask) for node in everything.values()))
        assert self.rig.keys(INODE) == len(everything)
        assert ns.regular_files() == sum(node.kind == "file" for node in everything.values())
        names = sum(len(parent.children) for parent in self.world.dirs())
        assert self.rig.keys(NAME) == self.rig.keys(COOKIE) == names
        assert self.rig.keys(ORPHAN) == sum(node.nlink == 0 for node in everything.values())
        if not any(node.kind == "file" for node in everything.values()):
            assert self.rig.keys(MAP) == 0

    def teardown(self) -> None:
        rig = trio.run(self.rig.committed)
        trio.run(rig.ns.reap_orphans)
        assert rig.ns.counts() == (len(self.world.nodes()), sum(sum(node.mask) for node in self.world.nodes()))


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
