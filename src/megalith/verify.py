"""`megalith verify`: whether token files and run directories are what was written, byte for byte, and what is wrong."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalith.checkpoint.contents import check_contents
from megalith.checkpoint.directory import STEP_NAME, list_checkpoints
from megalith.checkpoint.index import INDEX_NAME
from megalith.checkpoint.shards import DamagedError
from megalith.checkpoint.verify import verify, why_unread
from megalith.config import ConfigError
from megalith.data.indexed import bin_path, find_prefix, idx_path
from megalith.data.inspect import inspect
from megalith.data.tokenizer import load_saved_tokenizer
from megalith.sources import read_run_file
from megalith.terminal import counted, printable

SHOWN = ("documents", "files", "tensors", "tokens", "bytes")  # facts that are told to people
DAMAGED = 1  # exit status if anything is not as it should be
UNREAD = 2  # if nothing is known to be damaged, but something could not be read


@dataclass(frozen=True)
class Finding:
    """What was found out about one file or directory; sound if there are no faults.

    unread: the fault is that it may not be read, so that nothing is known of its bytes.
    """

    kind: str  # token file, checkpoint, tokenizer, run file
    path: Path
    faults: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    unread: bool = False

    def lines(self) -> Iterator[str]:
        """The finding for people."""
        told = ", ".join(counted(self.facts[name], name.removesuffix("s")) for name in SHOWN if name in self.facts)
        found = "UNREAD" if self.unread else "DAMAGED" if self.faults else "sound"
        yield f"{found:<8} {self.kind} {self.path}{f': {told}' if told else ''}"
        yield from (f"         {line}" for fault in self.faults for line in fault.splitlines())
        if self.facts.get("recorded") is False:
            yield "         nothing was recorded of it, so only its structure and its tokens were looked at"


def verify_all(paths: Sequence[str], *, vocab_size: int | None, as_json: bool) -> int:
    """Verify everything at the paths and print what was found; give the exit status.

    Raises ValueError, before anything is read, if a path is neither a token file's prefix nor a run directory.
    """
    work = [part for path in paths for part in parts_of(path)]
    findings = []
    for kind, path in work:
        finding = CHECKS[kind](path) if kind != "token file" else check_token_file(path, vocab_size)
        findings.append(finding)
        if not as_json:
            for line in finding.lines():
                print(printable(line), flush=True)
    sound = not any(finding.faults for finding in findings)
    if as_json:
        shown = [{**dataclasses.asdict(finding), "path": str(finding.path)} for finding in findings]
        print(json.dumps({"sound": sound, "findings": shown}))
    damaged = any(finding.faults and not finding.unread for finding in findings)
    return DAMAGED if damaged else 0 if sound else UNREAD


def parts_of(given: str) -> Iterator[tuple[str, Path]]:
    """What there is to verify at a path: kind and path of each part."""
    path = Path(given)
    if not path.is_dir():
        yield "token file", find_prefix(given)
        return
    if STEP_NAME.fullmatch(path.name) and (path / INDEX_NAME).exists():
        yield "checkpoint", path
        return
    checkpoints = list_checkpoints(path)
    if not checkpoints and not (path / "run.toml").exists():
        if bin_path(given).exists() or idx_path(given).exists():
            yield "token file", find_prefix(given)
            return
        raise ValueError(
            f"{path}: is no run directory (it has neither run.toml nor checkpoints), and no token file has this prefix"
        )
    yield "run file", path / "run.toml"
    if (path / "tokenizer").exists():
        yield "tokenizer", path / "tokenizer"
    # Text that --corpus made is the run's own.
    for index in sorted((path / "corpus").glob("*.idx")):
        yield "token file", index.with_suffix("")
    for checkpoint in checkpoints:
        yield "checkpoint", checkpoint.path


def check_token_file(path: Path, vocab_size: int | None) -> Finding:
    """Structure, sizes, tokens and, if they were recorded, digests."""
    found = inspect(path, vocab_size=vocab_size)
    names = "documents items tokens empty_documents largest_token dtype sha256 seconds".split()
    facts = {name: getattr(found, name) for name in names}
    return Finding(
        "token file", path, tuple(found.faults), {**facts, "bytes": found.num_bytes, "recorded": found.has_record}
    )


def check_checkpoint(path: Path) -> Finding:
    """Index, digest of every file, and that each file holds just the tensors that the index says."""
    try:
        index = verify(path)
        check_contents(index)
    except (DamagedError, OSError) as error:
        unread = why_unread(path, error)
        return Finding("checkpoint", path, (unread or str(error),), unread=unread is not None)
    facts = {"files": len(index.files), "tensors": len(index.tensors), "bytes": index.num_bytes}
    return Finding("checkpoint", path, (), {**facts, "step": index.step, "data": index.state.get("data")})


def check_tokenizer(path: Path) -> Finding:
    """Files and manifest."""
    try:
        tokenizer = load_saved_tokenizer(path)
    except (ValueError, OSError) as error:
        unread = why_unread(path, error)
        return Finding("tokenizer", path, (unread or str(error),), unread=unread is not None)
    return Finding("tokenizer", path, (), {"tokens": tokenizer.vocab_size, "digest": tokenizer.digest})


def check_run_file(path: Path) -> Finding:
    """TOML and settings."""
    _, faults = read_run_file(path)
    return Finding("run file", path, tuple(str(ConfigError([fault])) for fault in faults))


CHECKS = {"checkpoint": check_checkpoint, "tokenizer": check_tokenizer, "run file": check_run_file}
