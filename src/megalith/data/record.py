"""What preprocessing records of a token file, in PREFIX.json beside it, and what of that is checked at a start.

The structure of an .idx cannot tell another file's .bin of the same size, nor a token file that was made with another
tokenizer. The record can: it holds sizes, digests, the largest token and the tokenizer's digest. A token file without a
record, as Megatron-LM leaves it, is fine; a damaged record is not.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalith.data.index_file import map_file, refuse
from megalith.data.indexed import bin_path, idx_path
from megalith.data.survey import Survey
from megalith.files import Location, Written, digest_of, digest_of_bytes, write_whole

LARGEST_RECORD = 64 << 20  # bytes; a line for each input file is by far the most of it
MARK = b'{\n "megalith": '  # how a record begins; another program's PREFIX.json does not
DIGEST = "sha256"


@dataclass(frozen=True)
class Record:
    """What a record says. files: by their suffix. largest_token: None where there is no token, or tokens are floats."""

    path: Path
    files: Mapping[str, Written]
    largest_token: int | None
    tokenizer: str  # its kind
    tokenizer_digest: str
    vocab_size: int


def record_path(prefix: Location) -> Path:
    """The file beside PREFIX.bin and PREFIX.idx that says what they were made from."""
    return Path(f"{prefix}.json")


def write_record(prefix: Path, content: Mapping[str, Any], *, largest_token: int | None) -> None:
    """Write the record of a token file that lies there complete: content, what the files are, and a digest of it all.

    content begins with "megalith", the version, and has "tokenizer": type, vocab_size and digest.
    """
    written = {path.name: digest_of(path) for path in (bin_path(prefix), idx_path(prefix))}
    files = {name: {"size": file.size, DIGEST: file.digest} for name, file in written.items()}
    whole = {**content, "largest_token": largest_token, "files": files}
    write_whole(record_path(prefix), _text_of({**whole, DIGEST: _digest_of(whole)}))


def _text_of(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def _digest_of(content: Mapping[str, Any]) -> str:
    return digest_of_bytes(_text_of({name: value for name, value in content.items() if name != DIGEST}))


def read_record(prefix: Location) -> Record | None:
    """The record of the token file with this prefix; None if it has none.

    Raises ValueError, naming the file, if it was changed since it was written.
    """
    path = record_path(prefix)
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        text = file.read(LARGEST_RECORD + 1)
    if not text.startswith(MARK):
        return None
    remedy = "restore it or remove it: a token file needs none"
    if len(text) > LARGEST_RECORD:
        refuse(path, "size", f"at most {LARGEST_RECORD} bytes", f"more ({remedy})")
    try:
        content = json.loads(text)
        if content[DIGEST] != _digest_of(content) or text != _text_of(content).encode():
            raise ValueError("its digest is another")
        return _record_from(path, content)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: content: expected what was written, found changes ({error}); {remedy}") from error


def _record_from(path: Path, content: Mapping[str, Any]) -> Record:
    files = {Path(name).suffix: Written(int(f["size"]), str(f[DIGEST])) for name, f in content["files"].items()}
    tokenizer, largest = content["tokenizer"], content["largest_token"]
    return Record(
        path,
        {suffix: files[suffix] for suffix in (".bin", ".idx")},
        None if largest is None else int(largest),
        str(tokenizer["type"]),
        str(tokenizer["digest"]),
        int(tokenizer["vocab_size"]),
    )


def identify(
    prefix: Path, record: Record | None, *, vocab_size: int | None = None, survey: Survey | None = None
) -> dict[str, Any]:
    """What tells a token file from others, fit for JSON: its name, sizes and digests; the .bin's as it was recorded.

    It is held against its record, if there is one, as far as that is cheap: sizes, the .idx's digest, the largest token
    against vocab_size. survey: what is known of the files already. Raises ValueError with the file, what was expected
    and what was found.
    """
    for path in (bin_path(prefix), idx_path(prefix)):
        map_file(path)  # refuses what is no regular file, before it is read
    index = (survey or Survey()).digest(idx_path(prefix).resolve())
    bin_size = bin_path(prefix).stat().st_size
    if record is not None:
        check_sizes(prefix, record)
        if index != record.files[".idx"]:
            expected = f"{record.files['.idx'].digest}, by {record.path.name}"
            refuse(idx_path(prefix), "SHA-256", expected, f"{index.digest}: it was changed, or is of another corpus")
        if vocab_size is not None and record.largest_token is not None and record.largest_token >= vocab_size:
            refuse(
                bin_path(prefix),
                "largest token",
                f"one of the vocabulary, 0 to {vocab_size - 1}",
                f"{record.largest_token}, by {record.path.name}; "
                f"megalith verify {prefix} --vocab-size {vocab_size} names document and position of the first",
            )
    recorded = None if record is None else record.files[".bin"].digest
    return {"name": prefix.name, "idx_sha256": index.digest, "bin_size": bin_size, "bin_sha256": recorded}


def same_file(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two of what `identify` gives are of one token file, as far as they tell; names do not matter."""
    known = [name for name in ("idx_sha256", "bin_size", "bin_sha256") if one.get(name) and other.get(name)]
    return all(one[name] == other[name] for name in known)


def check_sizes(prefix: Path, record: Record) -> None:
    """Raise ValueError unless both files have the sizes that were recorded."""
    for path in (bin_path(prefix), idx_path(prefix)):
        expected, found = record.files[path.suffix].size, path.stat().st_size
        if found != expected:
            refuse(path, "size", f"{expected} bytes, by {record.path.name}", found)


def check_tokenizer(prefix: Path, record: Record, digests: Sequence[str]) -> None:
    """Raise ValueError if the token file was made with another tokenizer than the one with these digests."""
    if record.tokenizer_digest not in digests:
        refuse(
            bin_path(prefix),
            "tokenizer",
            f"the run's (digest {digests[0]:.12}...)",
            f"a {record.tokenizer} of {record.vocab_size} tokens (digest {record.tokenizer_digest:.12}..., by "
            f"{record.path.name}); give the run that one, or prepare the text with the run's",
        )


def check_prepared(prefix: Path, digests: Sequence[str]) -> None:
    """Raise ValueError if a token file is not of the size that was recorded, or of another tokenizer than these."""
    record = read_record(prefix)
    if record is not None:
        check_sizes(prefix, record)
        check_tokenizer(prefix, record, digests)
