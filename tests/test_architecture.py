"""The shape of the package: imports go down only, without cycles; no global state; nothing executes what it reads."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "megalith"

# Who may import whom: a module imports only from strictly lower levels, or from its own part.
LEVELS = [
    {"terminal", "elsewhere"},
    {
        "allocator",
        "command_line",
        "descriptors",
        "fields",
        "files",
        "host_tree",
        "kernels",
        "spinning",
        "later",
        "launch",
        "threads",
    },
    {"layers", "data", "optim", "monitor", "ranks"},
    {"models"},
    {"parallel", "checkpoint"},
    {"evaluate", "plan"},
    {
        "config",
        "derived",
        "sources",
        "check",
        "check_data",
        "check_layout",
        "check_tasks",
        "check_bert",
        "check_classify",
        "check_files",
        "check_ict",
        "check_t5",
        "check_vit",
        "compiling",
        "notices",
        "datasets",
        "sentence_datasets",
        "corpora",
        "data_sets",
        "task",
        "task_rows",
        "tasks",
        "turns",
    },
    {
        "adopt",
        "agreement",
        "asked",
        "bench",
        "candidates",
        "evaluations",
        "forecast",
        "generating",
        "guard",
        "continuity",
        "job",
        "keeper",
        "loaders",
        "measuring",
        "owner",
        "passes",
        "planned",
        "preprocess",
        "recheck",
        "resume",
        "run_state",
        "report",
        "closing",
        "train",
        "trained",
        "trained_images",
        "trained_pairs",
        "finetune",
        "trained_zeroshot",
        "trained_retrieval",
        "indexing",
        "retrieving",
        "room",
        "verify",
        "watching",
        "convert",
        "convert_from_hugging_face",
        "convert_from_megatron",
        "convert_to_hugging_face",
        "hugging_face",
        "hugging_face_config",
        "hugging_face_llama",
        "hugging_face_weights",
        "convert_to_megatron",
    },
    {"cli"},
]
# Modules of one level that are one part: they may import each other, without cycles.
TOGETHER = LEVELS[6:8]

# Names whose use would execute or unpickle what was read from disk, the network or the command line.
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = (
    "pickle cPickle _pickle dill cloudpickle marshal shelve joblib yaml ruamel jsonpickle multiprocessing xmlrpc "
    "torch.distributed.checkpoint torch.distributed.rpc torch.hub torch.jit torch.package torch.multiprocessing"
).split()
FORBIDDEN_ATTRIBUTES = (
    "yaml.load torch.load torch.hub torch.package torch.jit torch.multiprocessing torch.distributed.checkpoint "
    "torch.distributed.rpc dist.rpc os.system os.popen os.startfile os.spawnl os.spawnv os.execv os.execl os.execvp "
    "subprocess.getoutput subprocess.getstatusoutput pandas.read_pickle pd.read_pickle importlib.import_module"
).split()
# Collectives that send pickles; JSON between ranks goes through megalith.ranks.
FORBIDDEN_METHODS = (
    "all_gather_object broadcast_object_list gather_object scatter_object_list send_object_list recv_object_list "
    "unpack_archive extractall"
).split()
# Reads other programs' checkpoints, through weights_only loading in a process of its own.
READS_FOREIGN_FILES = {"megalith.checkpoint.foreign"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """Every module of the package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {nearest for name in found if (nearest := known_module(name)) is not None}


def known_module(name: str) -> str | None:
    """The module that an imported name belongs to, if it is one of ours."""
    while name.startswith("megalith"):
        if name in MODULES:
            return name
        name = name.rpartition(".")[0]
    return None


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def level_of(part: str) -> int:
    return next(number for number, parts in enumerate(LEVELS) if part in parts)


def top_level() -> set[str]:
    entry_points = {"megalith", "megalith.__main__", *(f"megalith.pretrain_{t}" for t in ("gpt", "bert", "t5", "ict"))}
    return entry_points | {"megalith.pretrain_vit"}


@pytest.mark.parametrize("module", sorted(set(MODULES) - top_level()))
def test_imports_go_down_only(module: str) -> None:
    part = part_of(module)
    for imported in imports_of(MODULES[module]) - {"megalith"}:
        other = part_of(imported)
        allowed = other == part or any({part, other} <= group for group in TOGETHER) or level_of(other) < level_of(part)
        assert allowed, f"{module} imports {imported}"


def test_no_part_but_train_and_cli_sees_the_whole_run() -> None:
    parts = [m for m in MODULES if m.count(".") == 2]
    for module in parts:
        if part_of(module) != "tasks":  # the rows of task_rows.py
            assert "megalith.config" not in imports_of(MODULES[module]), f"{module} imports the whole configuration"


def test_imports_have_no_cycles() -> None:
    graph = {name: imports_of(path) - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def faults_of(module: str, text: str) -> list[str]:
    """What in a source executes or unpickles data, keeps global state or hides faults."""
    found = [(node, fault) for node in ast.walk(ast.parse(text)) for fault in _faults_at(node, module)]
    return [f"{module}:{getattr(node, 'lineno', 0)} {fault}" for node, fault in found]


def _faults_at(node: ast.AST, module: str) -> Iterator[str]:
    if isinstance(node, ast.Global):
        yield "has a global statement"
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        if name in FORBIDDEN_CALLS:
            yield f"calls {name}"
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in ("np.load", "numpy.load") and "allow_pickle" not in given:
            yield "does not say allow_pickle=False"
        started = name.startswith("subprocess.") and node.args
        if started and isinstance(node.args[0], ast.Constant | ast.JoinedStr):
            yield "starts a program by a text"
    if isinstance(node, ast.Import | ast.ImportFrom):
        whole = [alias.name for alias in node.names]
        names = whole if isinstance(node, ast.Import) else [node.module or "", *(f"{node.module}.{n}" for n in whole)]
        for name in names:
            if any(name == bad or name.startswith(f"{bad}.") for bad in FORBIDDEN_MODULES):
                yield f"imports {name}, which can unpickle"
            if name in FORBIDDEN_ATTRIBUTES:
                yield f"imports {name}"
    if isinstance(node, ast.Attribute):
        if ast.unparse(node) in FORBIDDEN_ATTRIBUTES and module not in READS_FOREIGN_FILES:
            yield f"uses {ast.unparse(node)}"
        if node.attr in FORBIDDEN_METHODS:
            yield f"uses {node.attr}"
    if isinstance(node, ast.keyword):
        value = node.value.value if isinstance(node.value, ast.Constant) else None
        if node.arg in {"allow_pickle", "shell", "trust_remote_code"} and value is not False:
            yield f"sets {node.arg}"
        if node.arg == "weights_only" and value is False:
            yield "sets weights_only"
    if isinstance(node, ast.ExceptHandler):
        caught = None if node.type is None else ast.unparse(node.type)
        if caught in {None, "Exception", "(Exception,)", "BaseException"}:
            yield "catches every Exception"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_global_state_and_nothing_that_executes_data(module: str) -> None:
    assert not faults_of(module, MODULES[module].read_text(encoding="utf-8"))


# Each must be seen: a lint that passes these is no lint.
CAUGHT = """
eval(x)
exec(x)
import pickle
from pickle import loads
import yaml
from yaml import load
torch.load(x)
torch.load(x, weights_only=False)
from torch import load
torch.jit.load(x)
import torch.distributed.checkpoint as dcp
from torch.distributed import checkpoint
from torch.distributed.checkpoint import load
torch.package.PackageImporter(x)
np.load(x)
np.load(x, allow_pickle=True)
np.load(x, allow_pickle=y)
subprocess.run(x, shell=True)
subprocess.run("ls")
subprocess.run(f"ls {x}")
os.system(x)
os.popen(x)
dist.broadcast_object_list(x)
dist.all_gather_object(x, y)
f(x, trust_remote_code=True)
import joblib
archive.extractall()
import multiprocessing
""".split("\n")[1:-1]


@pytest.mark.parametrize("text", [*CAUGHT, "def f():\n    global x", "try:\n    f()\nexcept Exception:\n    pass"])
def test_the_lint_sees_what_it_is_there_for(text: str) -> None:
    assert faults_of("megalith.example", text)


def test_package_files_re_export_nothing() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            assert not isinstance(node, ast.Import | ast.ImportFrom), f"{path} imports"


def test_sizes_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    rows, functions = [], []
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        rows.append((text.count("\n"), name))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions.append(((node.end_lineno or 0) - node.lineno + 1, f"{name}.{node.name}"))
    assert rows and functions
    with capsys.disabled():
        longest_file, longest_function = max(rows), max(functions)
        print(
            f"\npackage: {sum(n for n, _ in rows)} lines in {len(rows)} files; longest file {longest_file[1]} "
            f"({longest_file[0]}), longest function {longest_function[1]} ({longest_function[0]})"
        )
