"""A checkpoint of one layout is loaded under every other, bit for bit, each rank reading its own part."""

import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalith.checkpoint.directory import CheckpointError
from megalith.checkpoint.index import Index
from megalith.checkpoint.pieces import Piece, whole
from megalith.checkpoint.store import load_latest, save
from megalith.checkpoint.verify import read_index
from megalith.host_tree import tree_of
from megalith.ranks import Ranks, RanksError
from tests.checkpoint.runs import SHAPES, assert_equal, empty, pieces_of, tensors_at
from tests.disks import failing_disk
from tests.ranks import run_ranks

WORLD_SIZES = (1, 2, 3, 4)


def save_on(run_dir: Path, world_size: int, step: int) -> None:
    def on_rank(rank: int) -> None:
        # Only rank 0's state counts.
        state = {"consumed_samples": 8 * step} if rank == 0 else {"rank": rank}
        save(run_dir, step, pieces_of(tensors_at(step), rank, world_size), state)

    run_ranks(on_rank, world_size)


def test_every_number_of_ranks_loads_what_any_other_saved(tmp_path: Path) -> None:
    for saved_on in WORLD_SIZES:
        save_on(tmp_path / str(saved_on), saved_on, step=saved_on)

    def on_rank(rank: int) -> None:
        for saved_on in WORLD_SIZES:
            tensors = empty()
            loaded = load_latest(tmp_path / str(saved_on), pieces_of(tensors, rank, dist.get_world_size()))
            assert loaded is not None and loaded.index.state == {"consumed_samples": 8 * saved_on}
            # The parts that other ranks hold stay as they were: put together they are the saved tensors.
            for name, tensor in tensors.items():
                gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
                dist.all_gather(gathered, tensor)
                combined = gathered[0]
                for part in gathered[1:]:
                    combined = torch.where(part.isnan(), combined, part)
                assert torch.equal(combined, tensors_at(saved_on)[name]), (saved_on, name)

    for world_size in WORLD_SIZES:
        run_ranks(on_rank, world_size)


def test_copies_are_written_once_and_files_shared_out(tmp_path: Path) -> None:
    save_on(tmp_path, 4, step=1)
    index = read_index(tmp_path / "checkpoints" / "step-0000001")
    assert index.num_bytes - sum(tensor.numel() * 4 for tensor in tensors_at(1).values()) < 4 * 500
    assert len(index.files) == 4
    assert [len(index.tensors[name].pieces) for name in sorted(SHAPES)] == [1, 1, 4, 4]


def test_a_grid_cut_is_loaded_under_another_grid(tmp_path: Path) -> None:
    table = torch.randn(10, 9, 4)

    def cut(tensor: torch.Tensor, rank: int, rows: int, columns: int) -> Piece:
        row, column = divmod(rank, columns)
        a, b = 10 * row // rows, 10 * (row + 1) // rows
        c, d = 9 * column // columns, 9 * (column + 1) // columns
        return Piece(tensor[a:b, c:d], (10, 9, 4), (a, c, 0))

    run_ranks(lambda rank: save(tmp_path, 1, {"w": cut(table, rank, 2, 2)}, {}), 4)

    def on_rank(rank: int) -> None:
        for rows, columns in ((1, 3), (3, 1)):
            piece = cut(torch.zeros(10, 9, 4), rank, rows, columns)
            load_latest(tmp_path, {"w": piece})
            assert torch.equal(piece.local, cut(table, rank, rows, columns).local)

    run_ranks(on_rank, 3)


def test_stages_of_a_pipeline_hold_different_tensors(tmp_path: Path) -> None:
    names = [f"layers.{number}.weight" for number in range(5)]

    def held(rank: int, world_size: int) -> dict[str, Piece]:
        return {name: whole(torch.full((3,), float(n))) for n, name in enumerate(names) if n * world_size // 5 == rank}

    run_ranks(lambda rank: save(tmp_path, 1, held(rank, 2), {}), 2)

    def on_rank(rank: int) -> None:
        pieces = held(rank, 3)
        for piece in pieces.values():
            piece.local.zero_()
        load_latest(tmp_path, pieces)
        for name, piece in held(rank, 3).items():
            assert torch.equal(pieces[name].local, piece.local)

    run_ranks(on_rank, 3)
    with pytest.raises(ValueError, match=r"the run has no layers\.3\.weight; layers\.4\.weight"):
        load_latest(tmp_path, {name: whole(torch.zeros(3)) for name in names[:3]})


def test_every_rank_is_told_of_another_ranks_fault(tmp_path: Path) -> None:
    def on_rank(rank: int) -> list[str]:
        said = []
        wrong = {"w": Piece(torch.zeros(1 + rank), (4,), (0,))}
        fitting = {"w": Piece(torch.zeros(2), (4,), (2 * rank,))}
        attempts = (
            lambda: save(tmp_path, 1, wrong, {}),
            lambda: save(tmp_path, 1, fitting, {"loss": float("inf")} if rank == 0 else {}),
            lambda: save(tmp_path, 1, {"../w" if rank else "w": fitting["w"]}, {}),
            lambda: save(tmp_path, 1, fitting, {}),
            lambda: load_latest(tmp_path, {"w" if rank == 0 else "v": fitting["w"]}),
            lambda: load_latest(tmp_path, fitting, disk=failing_disk(0 if rank else 1000)),
        )
        for attempt in attempts:
            try:
                attempt()
                said.append("done")
            except (ValueError, CheckpointError) as error:
                said.append(str(error))
        return said

    first, second = run_ranks(on_rank, 2)
    assert first == second
    assert "overlap" in first[0] and "state of the checkpoint" in first[1] and "rank 1: tensor name" in first[2]
    assert first[3] == "done" and "rank 1: it has no v" in first[4]
    assert "rank 1: [Errno 5] Input/output error" in first[5] and "can be used" in first[5]


def test_a_damaged_file_of_any_rank_sends_all_to_the_checkpoint_before(tmp_path: Path) -> None:
    save_on(tmp_path, 2, step=1)
    save_on(tmp_path, 2, step=2)
    with (tmp_path / "checkpoints" / "step-0000002" / "rank-00001.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([byte ^ 1]))

    def on_rank(rank: int) -> tuple[int, list[str]]:
        tensors = empty()
        loaded = load_latest(tmp_path, pieces_of(tensors))
        assert loaded is not None
        assert_equal(tensors, tensors_at(1))
        return loaded.index.step, loaded.messages()

    for step, said in run_ranks(on_rank, 3):
        assert step == 1
        assert "rank-00001.safetensors was changed" in said[0] and "1 step is lost" in said[1]


def test_no_rank_needs_memory_for_the_whole(tmp_path: Path) -> None:
    rows, columns = 1 << 14, 1 << 10  # 64 MiB
    save(tmp_path, 1, {"w": whole(torch.arange(rows * columns, dtype=torch.float32).view(rows, columns))}, {})

    def on_rank(rank: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        part = torch.empty(rows, columns // 4)
        load_latest(tmp_path, {"w": Piece(part, (rows, columns), (0, rank * columns // 4))})
        assert float(part[3, 5]) == 3 * columns + rank * columns // 4 + 5
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    # A quarter is 16 MiB; a digest reads 8 MiB at a time, the filling 4.
    assert max(run_ranks(on_rank, 4)) < 48 << 10


def test_ranks_exchange_json(tmp_path: Path) -> None:
    def on_rank(rank: int) -> None:
        ranks = Ranks()
        values = ranks.gather({"rank": rank, "text": "ä" * 1000 * rank})
        assert [value["rank"] for value in values] == [0, 1, 2] and len(values[2]["text"]) == 2000
        assert ranks.from_first(["first", rank]) == ["first", 0]

        def fail() -> int:
            if rank != 1:
                raise OSError(5, f"on {rank}")
            return rank

        with pytest.raises(RanksError, match=r"rank 0: \[Errno 5\] on 0; rank 2: \[Errno 5\] on 2"):
            ranks.together(fail)
        assert ranks.together(lambda: rank * rank) == [0, 1, 4]

    run_ranks(on_rank, 3)
    alone = Ranks()
    assert (alone.rank, alone.size, alone.gather((1, 2)), alone.from_first("x")) == (0, 1, [[1, 2]], "x")


def test_a_group_of_some_ranks_saves_by_itself(tmp_path: Path) -> None:
    def on_rank(rank: int) -> None:
        group = dist.new_group([1, 2], backend="gloo")
        if rank:
            save(
                tmp_path,
                1,
                {"w": Piece(torch.full((2,), float(rank)), (4,), (2 * rank - 2,))},
                {},
                ranks=Ranks(tree_of(group)),
            )

    run_ranks(on_rank, 3)
    tensor = torch.zeros(4)
    loaded = load_latest(tmp_path, {"w": whole(tensor)})
    assert loaded is not None and isinstance(loaded.index, Index)
    assert torch.equal(tensor, torch.tensor([1.0, 1.0, 2.0, 2.0]))
