"""Real text that every Python installation carries, so that a first run needs no download.

It is the language reference that pydoc shows, the docstrings of the standard library, and the code of some of its
modules without them (so that no text stands twice, once in training and once in validation data). Nothing is imported:
sources are parsed. Which modules there are differs between Python versions and distributions; all orders and choices
depend on a document's own name alone, so a missing module changes nothing else.
"""

import ast
import hashlib
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

SEED = "megalith"  # of the order of the documents and the choice of code
LARGEST_DOCUMENT = 8000  # characters; longer ones are cut at blank lines, so that a random split is even
SMALLEST_DOCUMENT = 200  # characters
CODE_SHARE = 1 / 3  # of the modules whose code is taken
# Directories of tests, of what others installed, of tables, and of modules on their way out of Python.
LEFT_OUT = frozenset(
    "test tests idle_test site-packages dist-packages __pycache__ ensurepip encodings distutils lib2to3 turtledemo "
    "lib-dynload".split()
)
MACHINE_FILES = "_sysconfigdata"  # what a file's name begins with that tells how this Python was built


def standard_library_documents() -> Iterator[str]:
    """The documents, some 5 MB, in a fixed order in which neighbours have nothing to do with each other.

    Raises ValueError where this Python has no sources on the disk.
    """
    yield from (text for _, text in titled_documents())


def titled_documents(*, code: bool = True) -> Iterator[tuple[str, str]]:
    """The same documents, each with a title: what module or topic it is of. Without code there are only sentences."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents: dict[str, str] = {}
    for path in _sources(root):
        documents.update(_documents_of(path, path.relative_to(root).as_posix()))
    if not documents:
        raise ValueError(
            f"{root}: expected the standard library's sources, found none; give a text of your own instead"
        )
    # Some modules share a text; it must not stand in training and in validation data.
    names: dict[str, str] = {}
    for name in sorted(documents, key=_shuffled):
        names.setdefault(documents[name], name)
    yield from ((_title_of(name), text) for text, name in names.items() if code or not _is_code(name))


def _sources(root: Path) -> Iterator[Path]:
    """The source files below a directory, without the directories that are LEFT_OUT."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        wanted = (name for name in names if name.endswith(".py") and not name.startswith(MACHINE_FILES))
        yield from (Path(folder, name) for name in wanted)


def _documents_of(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """The documents of one source file, each with a name of its own; none of a file that is not valid Python."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is out of date in a library's source does not matter here
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return
    if name == "pydoc_data/topics.py":
        for topic, text in sorted(_topics(tree).items()):
            yield from _parts(f"{name}:{topic}", text)
        return
    documented = _docstrings(tree, name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    yield from _parts(f"{name}:docstrings", "\n\n".join(f"{title}\n\n{text}" for title, text, _ in documented))
    if int(_shuffled(name)[:8], 16) < CODE_SHARE * 16**8:
        yield from _parts(f"{name}:code", _without(source, [node for _, _, node in documented]))


def _topics(tree: ast.Module) -> dict[str, str]:
    """The topics of the language reference: the one literal dict of text in pydoc's module."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics = ast.literal_eval(statement.value)
            return {name: text for name, text in topics.items() if isinstance(name, str) and isinstance(text, str)}
    return {}


def _docstrings(tree: ast.Module, module: str) -> list[tuple[str, str, ast.stmt]]:
    """The title, text and statement of each docstring, in the order of the source."""
    found: list[tuple[str, str, ast.stmt]] = []
    scopes: list[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]] = [(module, tree)]
    while scopes:
        title, scope = scopes.pop(0)
        text = ast.get_docstring(scope)
        if text:
            found.append((title, text, scope.body[0]))
        for inner in ast.iter_child_nodes(scope):
            if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                scopes.append((f"{title}.{inner.name}", inner))
    return sorted(found, key=lambda entry: entry[2].lineno)


def _without(source: str, statements: list[ast.stmt]) -> str:
    """A source without the lines of some statements."""
    lines = source.splitlines(keepends=True)
    for statement in statements:
        for number in range(statement.lineno - 1, statement.end_lineno or statement.lineno):
            lines[number] = ""
    return "".join(lines)


def _parts(name: str, text: str) -> Iterator[tuple[str, str]]:
    """A text cut at blank lines into documents of at most about LARGEST_DOCUMENT characters, each with its name."""
    held: list[str] = []
    number = size = 0
    for paragraph in text.strip().split("\n\n"):
        if held and size + len(paragraph) > LARGEST_DOCUMENT:
            yield f"{name}:{number}", "\n\n".join(held).strip("\n")
            held, number, size = [], number + 1, 0
        held.append(paragraph)
        size += len(paragraph) + 2
    rest = "\n\n".join(held).strip("\n")
    if len(rest) >= (1 if number else SMALLEST_DOCUMENT):
        yield f"{name}:{number}", rest


def _is_code(name: str) -> bool:
    return name.rpartition(":")[0].endswith(":code")


def _title_of(name: str) -> str:
    """What a document with this name is of, in words."""
    source, kind, _ = name.split(":", 2) if ":" in name else (name, "", "")
    if source == "pydoc_data/topics.py":
        return kind
    module = source.removesuffix(".py").removesuffix("/__init__").replace("/", " ")
    return f"{module} {'code' if kind == 'code' else 'documentation'}"


def _shuffled(name: str) -> str:
    return hashlib.sha256(f"{SEED}:{name}".encode()).hexdigest()
