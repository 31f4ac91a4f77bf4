"""Processes that tokenize blocks, in the order in which the blocks come, whatever order they are finished in.

A worker is this module run as a program. It reads blocks from its standard input, writes tokens to its standard output
(`_send`, `_receive`: JSON and plain bytes, no pickle) and ends when its input ends, so no worker outlives its parent. A
thread of the parent waits for each worker; how many blocks are under way, and so the memory, is bounded.
"""

import dataclasses
import json
import os
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Empty, LifoQueue
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

import megalith
from megalith.data.blocks import Block, DocumentRules, Part
from megalith.data.documents import Fault
from megalith.data.tokenized import TokenizedBlock, TokenRules, Tokens, tokenize_block
from megalith.data.tokenizer import Tokenizer, rebuild_tokenizer
from megalith.launch import as_program

BLOCKS_PER_WORKER = 2  # under way at once: one in work, one waiting
FRAME = struct.Struct("<QQ")  # bytes of the JSON, bytes that follow it
SECONDS_TO_END = 5.0  # that a worker gets once its input is closed or it was told to stop


class WorkerPool:
    """Tokenizes blocks in several processes; to be used in a `with` block, which leaves none behind."""

    def __init__(self, num_workers: int, rules: TokenRules, tokenizer: Tokenizer) -> None:
        self._num_workers = num_workers
        self._rules = rules
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="tokenize")
        self._idle: LifoQueue[_Worker] = LifoQueue()
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            # A thread that waits for a worker wakes up when that worker is gone.
            for worker in self._workers:
                worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def tokenize(self, blocks: Iterator[Block]) -> Iterator[TokenizedBlock]:
        """The blocks' tokens in the order of the blocks.

        What the iterator of blocks raises comes after the results of the blocks before it. Raises ChildProcessError
        when a worker dies.
        """
        pending: deque[Future[TokenizedBlock]] = deque()
        failure: ValueError | None = None
        while True:
            try:
                block = next(blocks)
            except StopIteration:
                break
            except ValueError as error:
                failure = error
                break
            pending.append(self._threads.submit(self._tokenize_one, block))
            if len(pending) > BLOCKS_PER_WORKER * self._num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
        if failure is not None:
            raise failure

    def _tokenize_one(self, block: Block) -> TokenizedBlock:
        try:
            worker = self._idle.get_nowait()
        except Empty:
            # At most one per thread: a worker is started when there is work for it.
            worker = _Worker()
            self._workers.append(worker)
            worker.set_up(self._rules, self._tokenizer)
        result = worker.tokenize(block)
        self._idle.put(worker)
        return result


class _Worker:
    """One process, seen from its parent."""

    def __init__(self) -> None:
        package = str(Path(megalith.__file__).parent.parent)
        path = os.pathsep.join(part for part in (package, os.environ.get("PYTHONPATH", "")) if part)
        # One worker per core: the libraries must not start threads of their own.
        alone = {"TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            as_program("megalith.data.worker_pool"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **alone, "PYTHONPATH": path},
            # Its own group, so that Ctrl-C at the terminal reaches the parent alone, which then stops the workers.
            process_group=0,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to_worker, self._from_worker = self._process.stdin, self._process.stdout

    def set_up(self, rules: TokenRules, tokenizer: Tokenizer) -> None:
        names = list(tokenizer.files)
        setup = {
            "rules": dataclasses.asdict(rules),
            "tokenizer": tokenizer.manifest(),
            "sizes": {name: len(tokenizer.files[name]) for name in names},
        }
        self._talk(setup, b"".join(tokenizer.files[name] for name in names))

    def tokenize(self, block: Block) -> TokenizedBlock:
        header = {"parts": [dataclasses.astuple(part) for part in block.parts], "num_read": block.num_read}
        answer, content = self._talk(header, block.content)
        return _unpack_result(answer, content)

    def _talk(self, header: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes]:
        try:
            _send(self._to_worker, header, content)
            answer, content = _receive(self._from_worker)
        except (BrokenPipeError, EOFError, ValueError) as error:
            raise ChildProcessError(self._why_dead()) from error
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer, content

    def _why_dead(self) -> str:
        name = f"a tokenizing process (pid {self._process.pid})"
        try:
            status = self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            return f"{name} does not answer any more"
        if status < 0:
            hint = "; if memory ran out, use fewer --workers" if status == -signal.SIGKILL else ""
            return f"{name} was ended by {signal.Signals(-status).name}{hint}"
        return f"{name} ended with status {status}; what it printed above says why"

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """End the process, gently at first, and wait for it."""
        for pipe in (self._to_worker, self._from_worker):
            # What was not sent yet may have no reader any more.
            with suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _send(pipe: IO[bytes], header: dict[str, Any], *contents: bytes) -> None:
    encoded = json.dumps(header).encode()
    pipe.write(FRAME.pack(len(encoded), sum(len(content) for content in contents)) + encoded)
    for content in contents:
        pipe.write(content)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """The next header and content; EOFError where the pipe ends, also in the middle of them."""
    header_size, size = FRAME.unpack(_read_exactly(pipe, FRAME.size))
    header: dict[str, Any] = json.loads(_read_exactly(pipe, header_size))
    return header, _read_exactly(pipe, size)


def _read_exactly(pipe: IO[bytes], size: int) -> bytes:
    content = pipe.read(size)
    if len(content) < size:
        raise EOFError(f"the pipe ended after {len(content)} of {size} bytes")
    return content


def _pack_result(result: TokenizedBlock) -> tuple[dict[str, Any], list[bytes]]:
    header = {
        "sizes": [[len(key.lengths), len(key.items), len(key.tokens), str(key.tokens.dtype)] for key in result.keys],
        "counts": [result.num_documents, result.num_bytes, result.num_read, result.num_bad],
        "faults": [dataclasses.astuple(fault) for fault in result.faults],
    }
    return header, [array.tobytes() for key in result.keys for array in (key.lengths, key.items, key.tokens)]


def _unpack_result(header: dict[str, Any], content: bytes) -> TokenizedBlock:
    keys: list[Tokens] = []
    begin = 0
    for num_lengths, num_items, num_tokens, dtype in header["sizes"]:
        arrays = []
        for count, kind in ((num_lengths, "int32"), (num_items, "int32"), (num_tokens, dtype)):
            arrays.append(np.frombuffer(content, kind, count, begin))
            begin += arrays[-1].nbytes
        keys.append(Tokens(*arrays))
    faults = tuple(Fault(*fault) for fault in header["faults"])
    num_documents, num_bytes, num_read, num_bad = header["counts"]
    return TokenizedBlock(tuple(keys), num_documents, num_bytes, num_read, num_bad, faults)


def _unpack_setup(header: dict[str, Any], content: bytes) -> tuple[TokenRules, Tokenizer]:
    documents = header["rules"].pop("documents")
    rules = TokenRules(DocumentRules(**{**documents, "keys": tuple(documents["keys"])}), **header["rules"])
    files: dict[str, bytes] = {}
    begin = 0
    for name, size in header["sizes"].items():
        files[name] = content[begin : begin + size]
        begin += size
    return rules, rebuild_tokenizer(header["tokenizer"], files, origin="the tokenizer sent to a worker")


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer the set-up and then blocks until the requests end; a ValueError is an answer, any other error ends it."""
    rules, tokenizer = _unpack_setup(*_receive(requests))
    _send(answers, {})
    while True:
        try:
            header, content = _receive(requests)
        except EOFError:
            return
        block = Block(tuple(Part(*part) for part in header["parts"]), content, header["num_read"])
        try:
            answer, contents = _pack_result(tokenize_block(block, rules, tokenizer))
        except ValueError as error:
            answer, contents = {"error": str(error)}, []
        _send(answers, answer, *contents)


def main() -> None:
    """Serve on standard input and output; whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        serve(sys.stdin.buffer, answers)
    except BrokenPipeError:
        # The parent is gone or has no use for the answer.
        os._exit(0)


if __name__ == "__main__":
    main()
