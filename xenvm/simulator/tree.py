# SPDX-License-Identifier: GPL-2.0-or-later
"""The tree of a simulated xenstore: nodes with owners, transactions, quotas. No input, no output.

It answers as the C xenstored of Xen 4.17 and 4.20 does; what is asked of all three is in tests/contract.
"""

from __future__ import annotations

import re

from xenvm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    Permission = tuple[str, int]
    Permissions = tuple[Permission, ...]

PATH: Final = re.compile(r"/|(/[A-Za-z0-9@_-]+)+", re.ASCII)
PERMISSION: Final = re.compile(r"([nrwb])(0|[1-9][0-9]{0,4})", re.ASCII)
NODES_QUOTA: Final = 1000  # of a guest; the defaults of xenstored(8)
PATH_QUOTA: Final = 2048  # XENSTORE_REL_PATH_MAX, xen/io/xs_wire.h: a rule for guests, not for dom0
SIZE_QUOTA_BYTES: Final = 2048
CONTROL_DOMID: Final = 0
OWNED_BY_CONTROL: Final = (("n", CONTROL_DOMID),)


class Refused(Exception):  # noqa: N818 - an answer, not a failure of ours
    """xenstored's answer to a request that it does not do; `name` is an errno name, as on the wire."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Node:
    """One node."""

    __slots__ = ("children", "generation", "permissions", "value")

    def __init__(self, value: bytes, permissions: Permissions, children: dict[str, None], generation: int) -> None:
        self.value = value
        self.permissions = permissions
        self.children = children
        self.generation = generation

    @property
    def owner(self) -> int:
        """The domain that may do all, beside dom0."""
        return self.permissions[0][1]


class Change(Record):
    """A node that was written, or removed with all below it; what a watch may fire for."""

    path: str
    removed: tuple[str, ...] = ()


class Tree:
    """All nodes. Methods take the domid in whose name they act, and raise Refused."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {"/": Node(b"", OWNED_BY_CONTROL, {}, 1)}
        self.counts: dict[int, int] = {}
        self._generation = 1

    def next_generation(self) -> int:
        """Return a number that no node has had."""
        self._generation += 1
        return self._generation

    def view(self) -> View:
        """Return what acts on the tree directly."""
        return View(self, None)

    def transaction(self) -> View:
        """Return what collects changes, for commit."""
        return View(self, {})

    def replace(self, path: str, node: Node | None) -> None:
        """Put a node in its place, None: take it away; owners' counts follow."""
        old = self.nodes.get(path)
        if old:
            self.counts[old.owner] = self.counts.get(old.owner, 0) - 1
        if node is None:
            self.nodes.pop(path, None)
            return
        node.generation = self.next_generation()
        self.nodes[path] = node
        self.counts[node.owner] = self.counts.get(node.owner, 0) + 1


class View:
    """The tree as one transaction sees it, or (without overlay) as it is."""

    def __init__(self, tree: Tree, overlay: dict[str, Node | None] | None) -> None:
        self._tree = tree
        self._overlay = overlay
        self._seen: dict[str, int] = {}
        self.changes: list[Change] = []

    # Nodes

    def _find(self, path: str) -> Node | None:
        if self._overlay is None:
            return self._tree.nodes.get(path)
        if path in self._overlay:
            return self._overlay[path]
        node = self._tree.nodes.get(path)
        self._seen.setdefault(path, node.generation if node else 0)
        return node

    def _put(self, path: str, node: Node | None) -> None:
        if self._overlay is None:
            self._tree.replace(path, node)
            return
        self._find(path)
        self._overlay[path] = node

    def _get(self, domid: int, path: str, wanted: str) -> Node:
        """Return a node on which the domain has the right `wanted`, r or w.

        Whether a node is there shows only to who may read the nearest one above it.
        """
        node = self._find(path)
        if node is None:
            raise Refused("ENOENT" if self._may_know(domid, path) else "EACCES")
        if not allows(node, domid, wanted):
            raise Refused("EACCES")
        return node

    def _may_know(self, domid: int, path: str) -> bool:
        while path != "/":
            path = parent_of(path)
            node = self._find(path)
            if node is not None:
                return allows(node, domid, "r")
        return True

    # Requests

    def read(self, domid: int, path: str) -> bytes:
        """Return the value."""
        return self._get(domid, path, "r").value

    def names(self, domid: int, path: str) -> list[str]:
        """Return the names of the children."""
        return [*self._get(domid, path, "r").children]

    def generation(self, path: str) -> int:
        """Return a number that changes with the node and its list of children."""
        node = self._find(path)
        return node.generation if node else 0

    def permissions(self, domid: int, path: str) -> Permissions:
        """Return owner and readers."""
        return self._get(domid, path, "r").permissions

    def write(self, domid: int, path: str, value: bytes) -> None:
        """Write a value; parents come into being, with the owner and readers of the nearest one there is."""
        if domid != CONTROL_DOMID and len(value) > SIZE_QUOTA_BYTES:
            raise Refused("ENOSPC")
        node = self._find(path)
        if node is None:
            self._create(domid, path, value)
        else:
            if not allows(node, domid, "w"):
                raise Refused("EACCES")
            self._put(path, Node(value, node.permissions, node.children, 0))
        self.changes.append(Change(path))

    def make(self, domid: int, path: str) -> None:
        """Make an empty node unless it is there."""
        node = self._find(path)
        if node is not None:
            if not allows(node, domid, "w"):
                raise Refused("EACCES")
            return
        self._create(domid, path, b"")
        self.changes.append(Change(path))

    def _create(self, domid: int, path: str, value: bytes) -> None:
        missing = [path]
        above = parent_of(path)
        while (parent := self._find(above)) is None:
            missing.append(above)
            above = parent_of(above)
        if not allows(parent, domid, "w"):
            raise Refused("EACCES")
        if domid != CONTROL_DOMID and self._tree.counts.get(domid, 0) + len(missing) > NODES_QUOTA:
            raise Refused("ENOSPC")
        permissions = parent.permissions
        if domid != CONTROL_DOMID:  # what a guest makes is its own
            permissions = ((permissions[0][0], domid), *permissions[1:])
        for made in reversed(missing):
            self._adopt(made)
            self._put(made, Node(value if made == path else b"", permissions, {}, 0))

    def _adopt(self, path: str) -> None:
        above = parent_of(path)
        parent = self._find(above)
        if parent is not None:
            children = {**parent.children, path.rpartition("/")[2]: None}
            self._put(above, Node(parent.value, parent.permissions, children, 0))

    def remove(self, domid: int, path: str) -> None:
        """Remove a node with all below it; one that is not there is fine as long as its parent is."""
        node = self._find(path)
        if node is None:
            self._get(domid, parent_of(path), "r")
            return
        if path == "/":
            raise Refused("EINVAL")
        if not allows(node, domid, "w"):
            raise Refused("EACCES")
        gone = self._below(path)
        for one in gone:
            self._put(one, None)
        above = parent_of(path)
        parent = self._find(above)
        if parent is not None:
            children = dict(parent.children)
            children.pop(path.rpartition("/")[2], None)
            self._put(above, Node(parent.value, parent.permissions, children, 0))
        self.changes.append(Change(path, tuple(gone)))

    def _below(self, path: str) -> list[str]:
        found, todo = [], [path]
        while todo:
            one = todo.pop()
            node = self._find(one)
            if node is not None:
                found.append(one)
                todo += [f"{one.rstrip('/')}/{name}" for name in node.children]
        return found

    def set_permissions(self, domid: int, path: str, permissions: Permissions) -> None:
        """Set owner and readers; only the owner and dom0 may, and only dom0 gives a node away."""
        node = self._find(path)
        if node is None:
            raise Refused("ENOENT" if self._may_know(domid, path) else "EACCES")
        if domid not in (CONTROL_DOMID, node.owner):
            raise Refused("EACCES")
        if domid != CONTROL_DOMID and permissions[0][1] != node.owner:
            raise Refused("EPERM")
        self._put(path, Node(node.value, permissions, node.children, 0))
        self.changes.append(Change(path))

    # Ends

    def commit(self) -> bool:
        """Make the changes of a transaction; False, and nothing is changed, when another writer was faster."""
        for path, generation in self._seen.items():
            node = self._tree.nodes.get(path)
            if (node.generation if node else 0) != generation:
                return False
        for path, node in (self._overlay or {}).items():
            self._tree.replace(path, node)
        return True

    def forget(self, domid: int) -> None:
        """Remove what a domain that is gone had, and its rights elsewhere."""
        tops = [path for path, node in self._tree.nodes.items() if node.owner == domid]
        for path in tops:
            if path in self._tree.nodes:
                self.remove(CONTROL_DOMID, path)
        for node in self._tree.nodes.values():
            if any(number == domid for _, number in node.permissions):
                node.permissions = tuple(entry for entry in node.permissions if entry[1] != domid) or OWNED_BY_CONTROL


def allows(node: Node, domid: int, wanted: str) -> bool:
    """Tell whether a domain has the right r or w on a node."""
    if domid in (CONTROL_DOMID, node.owner):
        return True
    letter = next((letter for letter, number in node.permissions[1:] if number == domid), node.permissions[0][0])
    return letter in (wanted, "b")


def parent_of(path: str) -> str:
    """Return the path of the node above."""
    return path.rpartition("/")[0] or "/"


def absolute(untrusted_path: bytes, domid: int) -> str:
    """Return the path that a request of `domid` means; Refused when it is none."""
    path = untrusted_path.decode("ascii", "replace")
    if not path.startswith("/"):
        path = f"/local/domain/{domid}/{path}"
    if (domid != CONTROL_DOMID and len(path) > PATH_QUOTA) or not PATH.fullmatch(path):
        raise Refused("EINVAL")
    return path


def permission(untrusted_text: bytes) -> Permission:
    """Return one entry of a list of permissions."""
    match = PERMISSION.fullmatch(untrusted_text.decode("ascii", "replace"))
    if not match:
        raise Refused("EINVAL")
    return match[1], int(match[2])
