"""What a disk may hold after a power loss: files and directories, of which only what was synced is sure.

Built from recorded operations. What was written to a file since its last sync may be there, missing, cut short or
zeros; what was changed in a directory since its last sync (a new name, a rename, a removal) may be undone.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from tests.faults.disk import Operation

# How much of what was not synced survives: nothing, everything, the names without what the files hold, what the files
# hold without the names, the first so many changes of each directory, or any of them.
Loss = Literal["all unsynced", "nothing", "contents", "zeroed contents", "names", "last names", "any"]
LOSSES: tuple[Loss, ...] = ("all unsynced", "nothing", "contents", "zeroed contents", "names")
DRAWN: tuple[Loss, ...] = ("last names", "any")


@dataclass
class File:
    """A file, as the writes that it consists of."""

    writes: list[bytes] = field(default_factory=list)
    synced: int = 0  # of the writes

    def surviving(self, loss: Loss, draw: random.Random) -> bytes:
        """What it may hold."""
        content = bytearray()
        end = 0
        for number, data in enumerate(self.writes):
            fate = "kept" if number < self.synced else _fate(loss, draw)
            kept = {"kept": data, "short": data[: draw.randrange(len(data) + 1)], "zeroed": bytes(len(data))}.get(fate)
            if kept is not None:
                content += bytes(end - len(content)) + kept
            end += len(data)
        return bytes(content)


def _fate(loss: Loss, draw: random.Random) -> str:
    if loss in ("nothing", "names"):
        return "kept"
    if loss in ("all unsynced", "contents"):
        return "absent"
    if loss == "zeroed contents":
        return "zeroed"
    return draw.choice(["kept", "absent", "short", "zeroed"])


Change: TypeAlias = list[tuple[str, "Node | None"]]  # names, and what they stand for now; None: nothing


@dataclass
class Directory:
    """A directory, as what is sure and what has changed since."""

    sure: dict[str, "Node"] = field(default_factory=dict)
    now: dict[str, "Node"] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    def change(self, change: Change) -> None:
        self.changes.append(change)
        _apply(self.now, change)

    def sync(self) -> None:
        self.sure = dict(self.now)
        self.changes.clear()

    def surviving(self, loss: Loss, draw: random.Random) -> dict[str, "Node"]:
        """The names that it may hold."""
        if loss in ("nothing", "contents", "zeroed contents"):
            return self.now
        kept: list[Change] = []
        if loss == "last names":
            kept = self.changes[: draw.randrange(len(self.changes) + 1)]
        elif loss == "any":
            kept = [change for change in self.changes if draw.random() < 0.5]
        names = dict(self.sure)
        for change in kept:
            # A rename of what was never there is none.
            if change[0][1] is not None or change[0][0] in names:
                _apply(names, change)
        return names


Node: TypeAlias = File | Directory


def _apply(names: dict[str, Node], change: Change) -> None:
    for name, node in change:
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class Medium:
    """The disk below a directory, to which recorded operations are done one after the other."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._top = Directory()

    def do(self, operation: Operation) -> None:
        """Nothing happens for an operation that changes nothing, or outside of the root."""
        path = Path(operation.path)
        if operation.name not in CHANGING or not path.is_relative_to(self._root):
            return
        if operation.name in ("write", "sync"):
            node = self._find(path)
            if isinstance(node, File):
                if operation.name == "write":
                    node.writes.append(operation.data)
                else:
                    node.synced = len(node.writes)
            elif node is not None:
                node.sync()
            return
        parent = self._directory(path.parent)
        if operation.name == "rename":
            source = Path(operation.source)
            assert source.parent == path.parent, "nothing is moved to another directory"
            parent.change([(source.name, None), (path.name, parent.now[source.name])])
        elif operation.name in ("create", "make_directory"):
            parent.change([(path.name, File() if operation.name == "create" else Directory())])
        else:
            parent.change([(path.name, None)])

    def surviving(self, loss: Loss, draw: random.Random) -> dict[str, bytes | None]:
        """A state after the power went: the content of each file, None for a directory, by path below the root."""
        return dict(sorted(_walk(self._top, "", loss, draw).items()))

    def _find(self, path: Path) -> Node | None:
        node: Node | None = self._top
        for part in path.relative_to(self._root).parts:
            node = node.now.get(part) if isinstance(node, Directory) else None
        return node

    def _directory(self, path: Path) -> Directory:
        """The directory of that path; one that was made without the disk that records is sure to be there."""
        found = self._top
        for part in path.relative_to(self._root).parts:
            inner = found.now.get(part)
            if inner is None:
                inner = found.now[part] = found.sure[part] = Directory()
            assert isinstance(inner, Directory)
            found = inner
        return found


CHANGING = ("create", "write", "sync", "rename", "remove", "make_directory", "remove_directory")


def _walk(directory: Directory, above: str, loss: Loss, draw: random.Random) -> dict[str, bytes | None]:
    state: dict[str, bytes | None] = {}
    for name, node in directory.surviving(loss, draw).items():
        if isinstance(node, File):
            state[above + name] = node.surviving(loss, draw)
        else:
            state[above + name] = None
            state |= _walk(node, f"{above}{name}/", loss, draw)
    return state


def lay_down(state: dict[str, bytes | None], folder: Path) -> None:
    """Make the files and directories of a state in a folder."""
    for name, content in state.items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)
