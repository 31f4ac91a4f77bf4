"""What a run has written to its log.jsonl, read as a reader of it would."""

import json
from pathlib import Path
from typing import Any


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSON-lines file, and the number of lines that are not whole: a kill leaves at most one.

    After a resume some steps appear twice: the later record is of the run that went on.
    """
    records, damaged = [], 0
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            damaged += 1
            continue
        if isinstance(record, dict):
            records.append(record)
        else:
            damaged += 1
    return records, damaged
