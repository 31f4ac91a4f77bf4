"""Names of torch that it does not promise to keep are there: where one is gone, it is told by name."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SOURCES = Path(__file__).parents[1] / "src" / "megalith"


def dotted(node: ast.expr) -> str | None:
    """torch.a.b as it is written; None for whatever does not begin with torch."""
    if isinstance(node, ast.Name):
        return "torch" if node.id == "torch" else None
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)) is not None:
        return f"{before}.{node.attr}"
    return None


def is_private(name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "torch" and any(part.startswith("_") and not part.startswith("__") for part in parts)


def names_in(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and (name := dotted(node)) is not None:
            yield name
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{imported.name}" for imported in node.names)
        elif isinstance(node, ast.Import):
            yield from (imported.name for imported in node.names)


def private_names() -> list[str]:
    """The longest of each: torch._C._distributed_c10d is said by what is taken from it."""
    found = {name for file in SOURCES.rglob("*.py") for name in names_in(file.read_text()) if is_private(name)}
    return sorted(name for name in found if not any(other.startswith(f"{name}.") for other in found))


def resolve(name: str) -> Any:
    """A module, or what is inside of one. Raises AttributeError if neither is there."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


@pytest.mark.parametrize("name", private_names())
def test_a_name_that_torch_does_not_promise_is_there(name: str) -> None:
    resolve(name)


def test_what_is_gone_is_told() -> None:
    assert "torch._fused_adamw_" in private_names()
    assert list(names_in("import torch\nx = torch._gone(1)"))[-1] == "torch._gone"
    with pytest.raises(AttributeError, match="_gone"):
        resolve("torch._gone")
