#!/usr/bin/env python3
"""Print docs/settings.md: every setting of a run, as the code declares it."""

from collections.abc import Iterator
from itertools import groupby

from megalith.config import Known, known_settings
from megalith.fields import describe
from megalith.sources import metavar

HEAD = """# Every setting of a run

What `megalith pretrain --help` lists; `bench`, `plan` and `finetune` take the same flags, other commands have a
`--help` of their own. In a run file (TOML) a setting is called by its name: its flag without the first hyphens, `_`
for `-`, unless the table gives another; a switch is `true` or `false`. It may stand under its table's heading in
brackets, or above all of them. In square brackets after a text is what a number counts, in round ones who uses the
setting; all do where there are none. This page is printed by `python scripts/settings_page.py`.
"""


def page() -> str:
    """The whole text."""
    lines = [HEAD]
    for part, settings in groupby(known_settings().items(), lambda item: item[1].part):
        lines += [f"## [{part}]", "", "| flag | what | default |", "|---|---|---|"]
        lines += [f"| {_flags(name, known)} | {_what(known)} | {_default(known)} |" for name, known in settings]
        lines.append("")
    return "\n".join(lines)


def _flags(name: str, known: Known) -> str:
    described = describe(known.field)
    value = "" if described["switch"] else " " + ("\\|".join(described["choices"]) or metavar(known.type))
    spelled = [f"`{flag}{value}`" for flag in (known.flag, *described["also"])]
    spelled += [f"`{flag}` ({chosen})" for flag, chosen in described["values"].items()]
    if described["switch"] == "off":
        spelled[-1] += f"; in a file `{name} = false`"
    elif name != known.flag.removeprefix("--").replace("-", "_"):
        spelled[-1] += f"; in a file `{name}`"
    return ", ".join(spelled)


def _what(known: Known) -> str:
    return " ".join(_parts(known)).replace("|", "\\|")


def _parts(known: Known) -> Iterator[str]:
    described = describe(known.field)
    yield str(described["help"])
    if described["unit"]:
        yield f"[{described['unit']}]"
    if described["task"]:
        yield f"({described['task']})"


def _default(known: Known) -> str:
    described, default = describe(known.field), known.field.default
    if described["switch"]:
        return "not given"
    return str(described["usual"] if default in (None, (), "") else default)


if __name__ == "__main__":
    print(page(), end="")
