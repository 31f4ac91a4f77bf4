"""What is noted of a pass, and what two passes' notes say."""

import torch

from megalith.parallel.digest import digest
from megalith.parallel.journal import Finding, Journal, Note, compare


def test_notes_stand_in_the_order_in_which_they_were_made() -> None:
    journal, tensor = Journal(), torch.arange(7.0)
    journal.made(tensor, "before")
    with journal.kept(with_gradients=True):
        journal.made(tensor, "a")
        journal.received(2 * tensor, "b")
        notes = journal.read()
    journal.made(tensor, "after")
    assert notes == [Note(True, "a", int(digest(tensor))), Note(False, "b", int(digest(2 * tensor)))]
    assert journal.read() == []


def test_each_time_is_noted_anew() -> None:
    journal = Journal()
    for _ in range(2):
        with journal.kept(with_gradients=True):
            journal.made(torch.ones(3), "a")
            assert len(journal.read()) == 1


def through_a_stage(journal: Journal) -> list[tuple[bool, str]]:
    buffer = torch.ones(2, 3, 4, requires_grad=True)
    stream = journal.entering(buffer) * 2
    journal.leaving(stream)
    stream.backward(torch.full((2, 3, 4), 3.0))
    return [(note.is_own, note.what) for note in journal.read()]


def test_a_stage_receives_and_makes_a_stream_and_then_a_gradient() -> None:
    journal = Journal()
    for _ in range(2):
        with journal.kept(with_gradients=True):
            assert through_a_stage(journal) == [
                (False, "the stream from another stage"),
                (True, "the stream to another stage"),
                (False, "the gradient from another stage"),
                (True, "the gradient to another stage"),
            ]


def test_without_gradients_nothing_is_noted_of_a_backward_pass() -> None:
    journal = Journal()
    with journal.kept(with_gradients=False):
        assert through_a_stage(journal) == [
            (False, "the stream from another stage"),
            (True, "the stream to another stage"),
        ]


NOTES = [Note(False, "stream", 1), Note(True, "sum", 2), Note(False, "sum", 3), Note(True, "gradient", 4)]


def changed(*places: int) -> list[Note]:
    return [note._replace(digest=9) if place in places else note for place, note in enumerate(NOTES)]


def test_the_first_difference_tells_whose_fault_it_is() -> None:
    assert compare(NOTES, NOTES) is None
    assert compare(NOTES, changed(1, 2, 3)) == Finding(True, ("sum", "gradient"))
    assert compare(NOTES, changed(0, 1, 2, 3)) == Finding(False, ("stream", "sum", "gradient"))
    assert compare(NOTES, changed(2, 3)) == Finding(False, ("sum", "gradient"))


def test_another_number_of_operations_is_a_difference() -> None:
    assert compare(NOTES, NOTES[:-1]) == Finding(True, ("the number of operations",))
