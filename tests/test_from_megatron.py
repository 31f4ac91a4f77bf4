"""docs/from-megatron.md says of every argument of Megatron-LM what it does here, and says what the code does."""

import json
import re
from pathlib import Path

import pytest

from megalith.config import known_settings
from megalith.derived import OURS
from megalith.fields import describe
from megalith.later import remedy_of
from megalith.notices import REPLACED

GUIDE = Path(__file__).parent.parent / "docs" / "from-megatron.md"
ROW = re.compile(r"\| `(\w+)` \| (?:`(--[\w-]+)`|\(none\)) \| (.+) \|")


@pytest.fixture(scope="module")
def table() -> dict[str, tuple[str | None, str]]:
    """Argument -> its flag, if it has one, and what the guide says of it."""
    rows = [ROW.fullmatch(line) for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    found = [row.groups() for row in rows if row is not None]
    assert len({name for name, _, _ in found}) == len(found), "an argument stands there twice"
    return {name: (flag, here) for name, flag, here in found}


def test_every_argument_is_there_once_with_its_flag(table: dict[str, tuple[str | None, str]], golden: Path) -> None:
    arguments = json.loads((golden / "arguments.json").read_text())["arguments"]
    wanted = {a["name"]: a["flag"] if str(a["flag"]).startswith("--") else None for a in arguments}
    assert {name: flag for name, (flag, _) in table.items()} == wanted
    assert len(wanted) == 139


def test_the_answered_arguments_are_those_that_the_program_answers_in_its_words(
    table: dict[str, tuple[str | None, str]],
) -> None:
    answered = {name: here for name, (_, here) in table.items() if here.startswith("answered: ")}
    assert answered == {name: f"answered: {instead}" for name, instead in REPLACED.items()}


def test_the_arguments_of_some_tasks_say_which(table: dict[str, tuple[str | None, str]]) -> None:
    tasks = {name: describe(known.field)["task"] for name, known in known_settings().items() if name not in OURS}
    for name, task in tasks.items():
        here = table[name][1]
        if not task or name in REPLACED:
            assert not here.startswith("only ")
        else:
            assert here.startswith(f"only {task}: "), name


def test_every_argument_is_the_same_mapped_answered_derived_or_another_tasks(
    table: dict[str, tuple[str | None, str]],
) -> None:
    for name, (flag, here) in table.items():
        assert re.match(r"same\b|(mapped|answered): |only \w+(, \w+)*: |derived: ", here), name
        assert here.startswith("derived: ") == (flag is None) == (name not in known_settings())


def test_every_flag_that_the_guide_names_exists() -> None:
    known = {flag for setting in known_settings().values() for flag in setting.flags}
    others = {"--batch-size", "--warmup", "--model-parallel-size"} | {"--from", "--to"}  # refused; of megalith convert
    others |= {"--dataset-impl", "--overwrite", "--keep-newlines", "--split-sentences", "--workers"}  # of preprocess
    named = set(re.findall(r"`(--[\w-]+)", GUIDE.read_text(encoding="utf-8")))
    assert {flag for flag in named - others - known if remedy_of(flag) is None} == set()


def test_every_rule_over_the_arguments_is_told() -> None:
    told = re.findall(r"^\| (R\d+)\b", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {f"R{number}" for number in range(20)} == set(told)
