"""The text that every Python installation carries."""

import sysconfig
from pathlib import Path

import pytest

import megalith.data.corpus
from megalith.data.corpus import standard_library_documents


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(standard_library_documents())


def test_there_are_a_few_megabytes_of_text(documents: list[str]) -> None:
    assert len(documents) > 300
    assert 1_000_000 < sum(len(text) for text in documents) < 20_000_000
    assert len(set(documents)) == len(documents)
    # Nearly all are short, so that a few percent of the documents are a few percent of the text.
    assert sorted(len(text) for text in documents)[len(documents) * 98 // 100] < 10_000


def test_the_order_is_fixed_and_mixed(documents: list[str]) -> None:
    assert list(standard_library_documents()) == documents
    code = [text.count("self.") > 3 for text in documents]
    third = len(code) // 3
    shares = [sum(code[begin : begin + third]) / third for begin in (0, third, 2 * third)]
    assert max(shares) - min(shares) < 0.12


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of our own making."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(megalith.data.corpus, "SMALLEST_DOCUMENT", 1)
    monkeypatch.setattr(megalith.data.corpus, "CODE_SHARE", 1)
    return tmp_path


SOURCE = '''"""What the module is for."""

def function():
    """What the function does."""
    return 1

class Class:
    """What the class is."""

    def method(self):
        """What the method does."""
'''


def test_docstrings_and_code_are_apart(library: Path) -> None:
    (library / "package").mkdir()
    (library / "package" / "__init__.py").write_text(SOURCE)
    code, docstrings = sorted(standard_library_documents(), key=lambda text: "What" in text)
    assert docstrings == (
        "package\n\nWhat the module is for.\n\npackage.function\n\nWhat the function does.\n\n"
        "package.Class\n\nWhat the class is.\n\npackage.Class.method\n\nWhat the method does."
    )
    assert code == "def function():\n    return 1\n\nclass Class:\n\n    def method(self):"


def test_topics_of_the_language_reference_are_documents(library: Path) -> None:
    (library / "pydoc_data").mkdir()
    (library / "pydoc_data" / "topics.py").write_text("topics = {'if': 'The if\\nstatement', 'for': r'''The for'''}\n")
    (library / "other.py").write_text(SOURCE)
    assert {"The if\nstatement", "The for"} < set(standard_library_documents())


def test_a_missing_module_changes_the_place_of_no_other(library: Path) -> None:
    for name in "abcdefgh":
        (library / f"{name}.py").write_text(f'"""Module {name}."""\n')
    before = list(standard_library_documents())
    (library / "c.py").unlink()
    assert list(standard_library_documents()) == [text for text in before if "Module c." not in text]


def test_tests_packages_and_damaged_files_are_left_out(library: Path) -> None:
    for folder in ("test", "site-packages", "json/tests"):
        (library / folder).mkdir(parents=True)
        (library / folder / "a.py").write_text('"""Not wanted."""\n')
    (library / "bad_syntax.py").write_text("def (\n")
    (library / "bad_bytes.py").write_bytes(b"'\xff'\n")
    (library / "good.py").write_text('"""Wanted."""\n')
    (library / "old_escape.py").write_text('"""Old \\\\d."""\n"\\d"\n')
    assert sorted(standard_library_documents()) == ['"\\d"', "good\n\nWanted.", "old_escape\n\nOld \\d."]


def test_long_texts_are_cut_at_blank_lines(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megalith.data.corpus, "LARGEST_DOCUMENT", 100)
    paragraphs = [f"Paragraph {number} " + "x" * 40 for number in range(6)]
    (library / "long.py").write_text('"""' + "\n\n".join(paragraphs) + '"""\n')
    parts = list(standard_library_documents())
    assert max(len(part) for part in parts) <= 120
    assert sorted(line for part in parts for line in part.split("\n\n") if line != "long") == paragraphs


def test_a_python_without_sources_is_told(library: Path) -> None:
    with pytest.raises(ValueError, match=f"{library}: expected the standard library's sources, found none"):
        list(standard_library_documents())
