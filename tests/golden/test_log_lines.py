"""A run of Megatron-LM, said again: every line of its log is made from the values it shows, byte for byte."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from megalith.monitor import events, lines
from megalith.monitor.events import Event
from megalith.monitor.memory import MemoryUse
from megalith.monitor.reference import reference_lines
from megalith.monitor.timers import SETUP_TIMERS, STEP_TIMERS

# What compilers and their build tools printed: nothing is compiled when Megalith starts.
COMPILING = re.compile(
    r"make: |> compiling |>>> done with |Detected CUDA files|Emitting ninja|Building extension|Allowing ninja|ninja: "
    r"|Loading extension"
)
DATETIME = re.compile(r"\[(.*)\] datetime: (.*) ")

# An event to be reported, or a line that announces work.
Said = tuple[Event | str, float]


class Reader:
    """Takes a log apart, line by line, into the events that would print it."""

    def __init__(self, text: str) -> None:
        assert text.endswith("\n")
        self.lines = [line for line in text[:-1].split("\n") if not COMPILING.match(line)]
        self.place = 0
        self.said: list[Said] = []

    def take(self, pattern: str) -> re.Match[str]:
        """The next line, which is to match the pattern as a whole."""
        line = self.lines[self.place]
        found = re.fullmatch(pattern, line)
        assert found is not None, f"line {self.place + 1} is {line!r}, not {pattern!r}"
        self.place += 1
        return found

    def at(self, pattern: str) -> bool:
        return self.place < len(self.lines) and re.match(pattern, self.lines[self.place]) is not None

    def say(self, event: Event | str, now: float = 0.0) -> None:
        self.said.append((event, now))

    def announce(self, text: str) -> None:
        """A line that stands for itself."""
        self.take(re.escape(text))
        self.say(text)

    def read(self) -> list[Said]:
        self.read_arguments()
        self.read_start()
        self.read_data()
        self.say(events.DatasetsBuilt(self.take(r"> finished creating (\w+) datasets \.\.\.")[1]))
        self.read_datetime()
        self.announce(lines.setup_done())
        self.read_timers(SETUP_TIMERS)
        self.take("training .*")
        self.say(events.TrainingStarted(0, 1000, 0, num_devices=1))
        self.read_datetime()
        while self.place < len(self.lines):
            self.read_iteration()
        return self.said

    def read_arguments(self) -> None:
        world = self.take(r"using world size: (\d+), .*size: (\d+), tensor\S+ size: (\d+), pipeline\S+ size: (\d+) ")
        dtype = self.take(r"using torch\.(\w+) for parameters .*")[1]
        self.take("-+ arguments -+")
        arguments = {}
        while self.at("  "):
            name, value = self.take(r"  (\w+) \.* (.*)").groups()
            arguments[name] = value
        self.take("-+ end of arguments -+")
        microbatches = int(self.take(r"setting number of micro-batches to constant (\d+)")[1])
        # In no order, as a test of the sorting.
        shuffled = {name: arguments[name] for name in sorted(arguments, key=lambda name: name[::-1])}
        processes, data, tensor, pipeline = (int(size) for size in world.groups())
        batch = int(arguments["global_batch_size"])
        self.say(events.RunStarted(shuffled, processes, data, tensor, pipeline, dtype, microbatches, batch))

    def read_start(self) -> None:
        name = self.take(r"> building (\w+) tokenizer .*")[1]
        self.say(lines.building_tokenizer(name))
        size, _, padded = map(int, self.take(r".*size: (\d+)\) with (\d+) dummy.*size: (\d+)\)").groups())
        self.say(events.TokenizerBuilt(name, size, padded))
        self.announce(lines.initializing_distributed())
        tensor = int(self.take(r"> initializing tensor model parallel with size (\d+)")[1])
        pipeline = int(self.take(r"> initializing pipeline model parallel with size (\d+)")[1])
        seed = int(self.take(r"> setting random seeds to (\d+) \.\.\.")[1])
        seeds = re.findall(r"\d+", self.take("> initializing model parallel cuda seeds .*")[0])
        self.say(events.RanksStarted(tensor, pipeline, seed, *map(int, seeds)))
        self.say(events.Initialized(float(self.take(r"time to initialize megatron \(seconds\): (.*)")[1])))
        self.read_datetime()
        self.announce(lines.building_model("GPT"))
        found = self.take(r" > number of parameters on .* rank \((\d+), (\d+)\): (\d+)")
        ranks = (events.RankParameters(*map(int, found.groups())),)
        self.say(events.ModelBuilt("GPT", ranks[0].num_parameters, ranks))
        self.say(events.ScheduleBuilt(self.take("> learning rate decay style: (.*)")[1]))
        self.read_datetime()

    def read_data(self) -> None:
        self.announce(lines.building_datasets())
        self.take(r" > datasets target sizes \(minimum size\):")
        targets = [int(self.take(rf"    {name}: +(\d+)")[1]) for name in ("train", "validation", "test")]
        self.say(events.TargetsSet(*targets))
        self.announce(lines.building_datasets("GPT"))
        for text in ("building dataset index", "reading", "reading", "reading", "creating numpy", "creating memory"):
            self.take(f" .*{text}.*")
        seconds = float(self.take(r" > finished creating indexed dataset in ([\d.]+) seconds")[1])
        self.say(events.CorpusOpened(int(self.take(r"    number of documents: (\d+)")[1]), seconds))
        self.take(" > dataset split:")
        parts = []
        while self.at("    "):
            name = self.take(r"    (\w+):")[1]
            first, end = self.take(r"     document indices in \[(\d+), (\d+)\) total of \d+ documents").groups()
            parts.append(events.CorpusPart(name, int(first), int(end)))
        self.say(events.CorpusSplit(tuple(parts)))
        for part in parts:
            self.read_maps(part.name)

    def read_maps(self, part: str) -> None:
        doc, sample, shuffle = (
            str(self.take(f" > loading {name}-idx mapping from (.*)")[1]) for name in ("doc", "sample", "shuffle")
        )
        seconds = float(self.take(r"    loaded indexed file in ([\d.]+) seconds")[1])
        rows = int(self.take(r"    total number of samples: (\d+)")[1])
        epochs = int(self.take(r"    total number of epochs: (\d+)")[1])
        self.say(events.MapsLoaded(part, doc, sample, shuffle, seconds, num_samples=rows - 1, num_epochs=epochs))

    def read_datetime(self) -> None:
        place, moment = self.take(DATETIME.pattern).groups()
        self.say(events.PlaceReached(place), time.mktime(time.strptime(moment, "%Y-%m-%d %H:%M:%S")))

    def read_timers(self, order: tuple[str, ...], step: int | None = None) -> None:
        values = dict(field.split(": ") for field in self.take(r"time \(ms\) \| (.*)")[1].split(" | "))
        assert set(values) <= set(order)
        seconds = {name: float(values[name]) / 1000.0 for name in order if name in values}
        self.say(events.TimersReported(seconds, step=step))

    def read_iteration(self) -> None:
        line = self.take(r" iteration .* \|")[0]
        fields = dict(field.strip().split(":") for field in line.split("|")[1:-1])
        step, last_step = (int(number) for number in line.split("|")[0].removeprefix(" iteration").split("/"))
        self.say(interval_of(step, last_step, fields))
        if self.at(r"\[Rank"):
            found = self.take(
                r"\[Rank (\d+)\] \(after (\d+) iterations\) memory.*: (.*) \|.*: (.*) \|.*: (.*) \|.*: (.*)"
            )
            sizes = [float(found[number]) * (1 << 20) for number in (3, 4, 5, 6)]
            assert all(size.is_integer() for size in sizes)
            use = MemoryUse(*(int(size) for size in sizes))
            self.say(events.MemoryReported(int(found[2]), (events.RankMemory(int(found[1]), use),)))
        self.read_timers(STEP_TIMERS, step)


def interval_of(step: int, last_step: int, fields: dict[str, str]) -> events.IntervalDone:
    """The event whose line has these fields; what the line is not to show has odd values."""
    norm = fields.get("grad norm")
    return events.IntervalDone(
        step=step,
        last_step=last_step,
        consumed_samples=int(fields["consumed samples"]),
        num_steps=1,
        num_skipped=int(fields["number of skipped iterations"]),
        num_nan=int(fields["number of nan iterations"]),
        seconds=float(fields["elapsed time per iteration (ms)"]) / 1000.0,
        step_seconds=-1.0,
        losses={"lm loss": float(fields["lm loss"])} if "lm loss" in fields else {},
        learning_rate=float(fields["learning rate"]),
        global_batch_size=int(fields["global batch size"]),
        loss_scale=float(fields["loss scale"]),
        grad_norm=None if norm is None else float(norm),
        num_zeros=None,
        params_norm=None,
        num_tokens=-1,
        tokens_per_second=-1.0,
        tflops_per_device=-1.0,
        mfu=-1.0,
    )


def spoken(said: list[Said]) -> str:
    text = ""
    for what, now in said:
        for line in [what] if isinstance(what, str) else reference_lines(what, now):
            text += line + "\n"
    return text


def test_every_line_of_the_reference_run_is_reproduced_byte_for_byte(golden: Path) -> None:
    log = (golden / "run.log").read_text(encoding="utf-8")
    kept = "".join(line for line in log.splitlines(keepends=True) if not COMPILING.match(line))
    said = Reader(log).read()
    assert spoken(said) == kept
    assert len(kept.splitlines()) == 251
    assert len(log.splitlines()) == 251 + 25  # the rest is about compiling
    assert sum(isinstance(event, events.IntervalDone) for event, _ in said) == 24


def test_the_log_that_is_read_is_told_apart_field_by_field(golden: Path) -> None:
    """A changed digit anywhere in the log changes what is said: the reader hands on values, not lines."""
    log = (golden / "run.log").read_text(encoding="utf-8")
    changed = log.replace("4.687E-05", "4.688E-05").replace("(new size: 50304)", "(new size: 50305)")
    assert "4.688E-05" in spoken(Reader(changed).read())
    assert "with 48 dummy tokens (new size: 50305)" in spoken(Reader(changed).read())


def test_an_argument_name_longer_than_the_column_gets_no_dots() -> None:
    name = "a" * 50
    assert lines.arguments({name: 1})[1] == f"  {name}  1"


def cases(golden: Path) -> list[dict[str, Any]]:
    data = json.loads((golden / "gpt_index_maps.json").read_text(encoding="utf-8"))
    return [case for case in data["cases"] if case.get("python_stdout")]


def seconds_after(text: str, printed: list[str]) -> float:
    return next(float(line.rsplit(": ", 1)[1]) for line in printed if text in line)


def test_the_lines_about_building_index_maps_are_those_that_megatron_printed(golden: Path) -> None:
    """All but the sizes, which its compiled helper writes past Python's output."""
    assert len(cases(golden)) >= 19
    for case in cases(golden):
        printed = [line for line in case["python_stdout"] if "reading" not in line and "creating" not in line]
        tokens, epochs, length = case["tokens_per_epoch"], case["num_epochs"], case["seq_length"]
        samples = (epochs * tokens - 1) // length
        before_last = ((epochs - 1) * tokens - 1) // length
        built = events.MapsBuilt(
            num_documents=case["documents"][1] - case["documents"][0],
            num_epochs=epochs,
            seq_length=length,
            num_samples=samples,
            samples_before_last_epoch=before_last if case["separate_last_epoch"] else samples,
            samples_per_epoch=(tokens - 1) // length,
            last_epoch_samples=case["num_samples"] - before_last,
            separate_last_epoch=case["separate_last_epoch"],
            document_seconds=seconds_after("doc-idx mapping (", printed),
            sample_seconds=seconds_after("sample-idx mapping (", printed),
            shuffle_seconds=seconds_after("shuffle-idx mapping (", printed),
        )
        doc, sample, shuffle = (line.split(" from ")[1] for line in printed if " from " in line)
        took = next(float(line.split()[4]) for line in printed if "loaded indexed file" in line)
        rows = case["len_dataset"]
        loaded = events.MapsLoaded(case["name"], doc, sample, shuffle, took, num_samples=rows, num_epochs=epochs)
        said = [*reference_lines(built, 0.0), *reference_lines(loaded, 0.0)]
        sizes = said.index("    using:")
        assert said[sizes + 4] == f"     total number of samples:   {samples}"
        assert said[:sizes] + said[sizes + 5 :] == printed


@pytest.mark.parametrize(("number", "shown"), [(0.828387, "0.828387"), (1.0, "1"), (1 / 3, "0.333333")])
def test_the_shares_of_a_blend_have_six_digits(number: float, shown: str) -> None:
    said = reference_lines(events.BlendBuilt((number,), (number,), 0.004), 0.0)
    assert said[2] == f"   dataset 0, input: {shown}, achieved: {shown}"
    assert said[3] == "> elapsed time for building blendable dataset indices: 0.00 (sec)"
