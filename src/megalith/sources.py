"""Where a configuration comes from: presets, TOML run files and the command line; later wins, in this order.

It wins over the same setting, and over those that it cannot stand beside (`config.overlay`).
"""

import argparse
import dataclasses
import importlib.resources
import os
import stat
import tomllib
import typing
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from megalith import later
from megalith.checkpoint.settings import FOLDER as CHECKPOINTS
from megalith.command_line import as_wide_as_the_terminal
from megalith.config import (
    REMOVED,
    TASKS,
    ConfigError,
    Fault,
    Run,
    compose,
    convert,
    known_settings,
    meant,
    nearest,
    overlay,
)
from megalith.fields import describe
from megalith.files import write_whole
from megalith.terminal import redacted

LARGEST_RUN_FILE = 256 << 10  # bytes
MOST_DOTS = 1000  # in a line: the library's work on a key of so many parts is their square
LONGEST_LIST = 1000  # characters; longer ones are written with a line for each entry


def preset_names() -> list[str]:
    """The presets that ship with the package."""
    folder = importlib.resources.files("megalith.presets")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_preset(name: str) -> tuple[dict[str, Any], list[Fault]]:
    """The settings of a preset, as `read_run_file` gives them."""
    if name not in preset_names():
        known = preset_names()
        return {}, [Fault("--preset", name, f"is not one of {', '.join(known)}", nearest(name, known))]
    text = importlib.resources.files("megalith.presets").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return settings_of_toml(text, f"preset {name}")


def read_run_file(path: Path) -> tuple[dict[str, Any], list[Fault]]:
    """The settings of a TOML run file, and what is wrong with it. `task` stands at the top, the others in sections."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_RUN_FILE:
            rule = f"is no regular file of at most {LARGEST_RUN_FILE} bytes"
            return {}, [Fault(str(path), None, rule, "Name a TOML run file")]
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        return {}, [Fault(str(path), None, f"cannot be read ({error.strerror})", "Name a TOML run file that exists")]
    except UnicodeDecodeError:
        return {}, [Fault(str(path), None, "is not UTF-8 text", "Name a TOML run file")]
    return settings_of_toml(text, str(path))


def settings_of_toml(text: str, source: str) -> tuple[dict[str, Any], list[Fault]]:
    """The settings in the text of a run file, and what is wrong with it; source: what to call it."""
    if any(line.count(".") > MOST_DOTS for line in text.splitlines()):
        return {}, [Fault(source, None, f"has a line with more than {MOST_DOTS} dots", "Break the line")]
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # ValueError itself: of a number with more digits than Python reads.
        return {}, [Fault(source, None, f"is not valid TOML: {error}", "Correct the file")]
    known, values, faults = known_settings(), dict[str, Any](), list[Fault]()
    sections = ("model", "data", "optimizer", "parallel", "checkpoint", "monitor", "evaluate", "train")
    flat: list[tuple[str, Any]] = []
    for key, entry in document.items():
        if isinstance(entry, dict) and key in sections:
            flat += entry.items()
        elif isinstance(entry, dict):
            rule = f"is not one of the sections {', '.join(sections)}"
            faults.append(Fault(f"{source} [{key}]", None, rule, nearest(key, sections)))
        else:
            flat.append((key, entry))
    for key, entry in flat:
        name = key.replace("-", "_")
        if name == "task" and entry in TASKS:
            values["task"] = entry
        elif name == "task":
            faults.append(
                Fault(f"{source} task", _as_written(entry), f"must be one of {', '.join(TASKS)}", "Change it")
            )
        elif name == "preset":
            remedy = "Give --preset NAME behind the file"
            faults.append(Fault(f"{source} {key}", _as_written(entry), "stands on the command line only", remedy))
        elif name not in known:
            faults.append(Fault(f"{source} {key}", None, "is not a known setting", meant(name, known)))
        else:
            value, fault = convert(name, known[name], entry, is_typed=True)
            if fault:
                faults.append(dataclasses.replace(fault, setting=f"{source} {key}", value=_as_written(entry)))
            else:
                values[name] = value
    return values, faults


def as_toml(run: Run) -> str:
    """A run file that gives this run again: every setting that differs from its default, by section; no secrets."""
    lines = [f'task = "{run.task}"']
    for part in dataclasses.fields(Run):
        if part.name == "task":
            continue
        config = getattr(run, part.name)
        changed = [f for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
        if changed:
            lines += ["", f"[{part.name}]"]
            lines += [f"{f.name} = {_toml_value(getattr(config, f.name))}" for f in changed]
    return "\n".join(lines) + "\n"


def _as_written(entry: object) -> str:
    """An entry of a TOML file in one line, as the file has it."""
    if isinstance(entry, dict):
        return "{" + ", ".join(f"{key} = {_as_written(value)}" for key, value in entry.items()) + "}"
    if isinstance(entry, list):
        return f"[{', '.join(map(_as_written, entry))}]"
    return _toml_value(entry) if isinstance(entry, bool | int | float | str) else str(entry)


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        items = [_toml_value(item) for item in value]
        flat = f"[{', '.join(items)}]"
        return flat if len(flat) <= LONGEST_LIST else "[\n    " + ",\n    ".join(items) + ",\n]"
    text = redacted(str(value)).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else _toml_escape(c) for c in text) + '"'


def _toml_escape(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(message)


def flag_parser() -> argparse.ArgumentParser:
    """The parser of all flags. Values stay text here, so that `convert` can report every fault at once."""
    parser = _Parser(
        prog="megalith pretrain",
        usage="megalith pretrain [TASK] [RUN.toml] [--preset NAME] [--flags ...]",
        description=f"Pretrain a model. TASK is one of {', '.join(TASKS)} (default gpt). "
        "Later wins: preset, run file, flags.",
        allow_abbrev=False,
        formatter_class=as_wide_as_the_terminal(44),
        argument_default=argparse.SUPPRESS,
        exit_on_error=False,
    )
    parser.add_argument("--preset", metavar="NAME", help=f"start from a preset: {', '.join(preset_names())}")
    groups: dict[str, Any] = {}
    for name, known in known_settings().items():
        described = describe(known.field)
        section = str(described["section"])
        group = groups.setdefault(section, parser.add_argument_group(section))
        default, unit = known.field.default, described["unit"]
        words = [str(described["help"]).replace("%", "%%")]
        spellings = [known.flag, *described["also"]]
        if described["task"]:
            words.append(f"({described['task']})")
        if described["switch"]:
            group.add_argument(
                *spellings, dest=name, action="store_const", const=described["switch"] == "on", help=" ".join(words)
            )
            continue
        default = described["usual"] if default in (None, ()) else default
        shown = "no default" if default == "" else f"default {default}"
        words.append(f"[{unit}; {shown}]" if unit else f"[{shown}]")
        value = "|".join(described["choices"]) or metavar(known.type)
        group.add_argument(
            *spellings, dest=name, metavar=value, nargs=described["repeat"] or None, help=" ".join(words)
        )
        for flag, value in described["values"].items():
            group.add_argument(flag, dest=name, action="store_const", const=value, help=f"as {known.flag} {value}")
    return parser


def metavar(kind: Any) -> str:
    """What stands for a value of this type after a flag."""
    text = str(kind)
    return "N" if "int" in text else "X" if "float" in text else "TEXT"


def read_flags(words: Sequence[str]) -> tuple[dict[str, Any], list[Fault]]:
    """The settings that flags give, `preset` among them, and what is wrong with the flags."""
    parser, known, faults = flag_parser(), known_settings(), list[Fault]()
    words = list(words)
    for word in [w.split("=", 1)[0] for w in words]:
        if word in REMOVED:
            faults.append(Fault(word, None, "was removed", f"Use {REMOVED[word]} instead"))
    words = [w for w in words if w.split("=", 1)[0] not in REMOVED]
    words, found = _without_values_of_switches(words)
    faults += found
    while True:
        try:
            parsed, rest = parser.parse_known_args(words)
            break
        except argparse.ArgumentError as error:
            # Left out, so that the other words can be read.
            spellings = (error.argument_name or "").split("/")
            given = [word for word in words if word.split("=", 1)[0] in spellings]
            if not given:
                return {}, [*faults, Fault("the command line", None, str(error), "See megalith pretrain --help")]
            faults.append(Fault(given[-1], None, error.message, "See megalith pretrain --help"))
            words = [word for word in words if word not in given]
    flags = [flag for entry in known.values() for flag in entry.flags] + ["--preset"]
    unknown_before = bool(faults)
    for word in rest:
        if word.startswith("-") and word != "-":
            flag = word.split("=", 1)[0]
            if remedy := later.remedy_of(flag):
                faults.append(Fault(flag, None, later.RULE, remedy))
            else:
                faults.append(Fault(flag, None, "is not a known flag", meant(flag, flags)))
            unknown_before = True
        elif not unknown_before:
            stands_in_front = word in TASKS or word.endswith(".toml")
            remedy = "Name it in front of all flags" if stands_in_front else "Flags begin with --"
            faults.append(Fault(word, None, "is not expected here", remedy))
    values: dict[str, Any] = {}
    for name, given in vars(parsed).items():
        if name == "preset":
            values[name] = given
            continue
        value, fault = convert(name, known[name], given)
        if fault:
            faults.append(fault)
        else:
            values[name] = value
    return values, faults


def _without_values_of_switches(words: Sequence[str]) -> tuple[list[str], list[Fault]]:
    """The words but values that were given to flags that take none, as in --bf16 true; and a fault for each value."""
    switches = {
        flag
        for known in known_settings().values()
        for flag in (known.flags if describe(known.field)["switch"] else describe(known.field)["values"])
    }
    kept, faults, before = list[str](), list[Fault](), ""
    for word in words:
        flag, equals, value = word.partition("=")
        if not equals:
            flag, value = before, word
        if flag in switches and (equals or not value.startswith("-")):
            faults.append(Fault(flag, value, "takes no value", "Write the flag alone, or leave it out"))
        else:
            kept.append(word)
        before = word
    return kept, faults


def read_command_line(words: Sequence[str]) -> Run:
    """The run that `megalith pretrain WORDS` asks for.

    Raises ConfigError with every fault of the words, the preset and the run file.
    """
    words = list(words)
    task: str | None = None
    run_file: str | None = None
    file_values: dict[str, Any] = {}
    faults: list[Fault] = []
    while words and not words[0].startswith("-"):
        word = words.pop(0)
        if word.endswith(".toml"):
            if run_file is not None:
                faults.append(Fault(word, None, f"is a second run file, beside {run_file}", "Give one of them"))
            run_file = word
            file_values, found = read_run_file(Path(word))
            faults += found
        elif word in TASKS:
            if task is not None:
                faults.append(Fault(word, None, f"is a second task, beside {task}", "Give one of them"))
            task = word
        else:
            remedy = nearest(word, TASKS)
            faults.append(Fault(word, None, f"is neither a task ({', '.join(TASKS)}) nor a run file (.toml)", remedy))
    flag_values, found = read_flags(words)
    faults += found
    preset_values: dict[str, Any] = {}
    if preset := flag_values.pop("preset", None):
        preset_values, found = read_preset(preset)
        faults += found
    if faults:
        raise ConfigError(faults)
    values = overlay([preset_values, file_values, flag_values])
    file_task = values.pop("task", None)
    return compose(task or file_task or "gpt", values)


def moved_run_files(words: Sequence[str], run: Run) -> list[Fault]:
    """A run directory's own file whose paths, read from here, name another run directory."""
    faults = []
    for word in takewhile(lambda word: not word.startswith("-"), words):
        home, save = Path(word).parent, run.checkpoint.save
        gives_save = any(flag == "--save" or flag.startswith("--save=") for flag in words)
        if not word.endswith(".toml") or save is None or gives_save or not (home / CHECKPOINTS).is_dir():
            continue
        if os.path.realpath(save) != os.path.realpath(home):
            rule = f"lies in a run directory, and from here its --save = {save} is another one"
            faults.append(Fault(word, None, rule, "Start where its run was started, or give --save DIR"))
    return faults


def write_run_file(run: Run) -> None:
    """Keep the run's settings in its run directory, as a run file that gives the same run again."""
    if run.checkpoint.save is not None:
        folder = Path(run.checkpoint.save)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "run.toml", as_toml(run))
