"""What the documents show is there: commands, their flags, and the files that they name."""

import contextlib
import io
import re
import runpy
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from megalith.check import check
from megalith.cli import main
from megalith.config import known_settings
from megalith.sources import read_command_line

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "LOG.md")]
TAKES_FLAGS_OF_PRETRAIN = {"bench", "finetune", "plan"}
FILES = re.compile(r"`((?:tests|docs|benchmarks|scripts|src)/[\w./*-]+)`|\]\(([\w./-]+)(?:#[\w-]+)?\)")


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(command, its flags) of every `megalith ...` in blocks of code and in single marks of code."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"^ {4}(megalith .*)$", text, re.MULTILINE)
    blocks += re.findall(r"`(megalith [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            for words in re.findall(r"(?:megalith|-m megalith) ([a-z].*?)(?:&&|#|$)", line):
                command = words.split()[0]
                yield command, re.findall(r"(?<![\w-])--[a-z][\w-]*", words)


@cache
def flags_of(command: str) -> set[str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([command, "--help"])
    flags = set(re.findall(r"--[a-z][\w-]*", said.getvalue()))
    return flags | flags_of("pretrain") if command in TAKES_FLAGS_OF_PRETRAIN else flags


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_that_is_shown_has_its_flags(document: Path) -> None:
    shown = list(commands(document.read_text(encoding="utf-8")))
    assert shown
    assert not [command for command, _ in shown if "--help" not in flags_of(command)]
    assert not [(command, flag) for command, flags in shown for flag in flags if flag not in flags_of(command)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_is_named_is_there(document: Path) -> None:
    named = [code or link for code, link in FILES.findall(document.read_text(encoding="utf-8"))]
    missing = [name for name in named if not any(any(folder.glob(name)) for folder in (ROOT, document.parent))]
    assert not missing


def test_every_run_that_the_first_guide_shows_can_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name, content in re.findall(r"^```toml\n# (\S+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(content)
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    shown = [
        line.split("pretrain", 1)[1] for line in blocks.splitlines() if re.search(r"(^|&& )megalith pretrain", line)
    ]
    runs = [read_command_line(shlex.split(words)) for words in shown if "..." not in words]
    assert len(runs) == 3
    assert [fault for run in runs for fault in check(run, 1)] == []


def test_the_page_of_all_settings_is_what_the_code_declares() -> None:
    printed = runpy.run_path(str(ROOT / "scripts" / "settings_page.py"))["page"]()
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == printed
    names = {known.flag for known in known_settings().values()}
    assert {flag for flag in names if f"`{flag}`" not in printed and f"`{flag} " not in printed} == set()
