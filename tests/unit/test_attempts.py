"""How a shard is tried again, and who is charged when a worker dies. No Ray: the plain object."""

import pytest

from granite_ray.attempts import MAX_DEATHS_IN_A_ROW, MAX_SHARD_DEATHS, Journal
from granite_ray.errors import ConfigError, InfrastructureError

NODE = "node"


def counts(
    documents: int = 0, failed: int = 0, prompt_tokens: int = 0, completion_tokens: int = 0
) -> dict[str, int]:
    return {
        "documents": documents,
        "failed": failed,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "cached_tokens": 0,
    }


def start(alive: bool = True) -> Journal:
    return Journal(lambda _: alive)


def die(journal: Journal, shard_id: str, document: int | None = None) -> None:
    """A worker takes a shard up, comes as far as told, and dies."""
    journal.begin(shard_id, NODE)
    journal.enter(shard_id)
    if document is not None:
        journal.begin_document(shard_id, document)


def answer_documents(journal: Journal, number: int) -> None:
    """A replica has answered so many documents by now."""
    journal.report("replica", "process-1", counts(documents=number, prompt_tokens=number), 0)


def test_a_shard_is_tried_together_then_alone_then_one_document_at_a_time() -> None:
    journal = start()
    modes = []
    for _ in range(4):
        modes.append(journal.begin("s", NODE).mode)
        journal.enter("s")
    assert modes == ["together", "alone", "one_by_one", "one_by_one"]
    assert journal.state()["num_deaths"] == 3


def test_a_shard_that_still_waits_for_its_place_is_not_charged() -> None:
    journal = start()
    journal.begin("poison", NODE)
    journal.enter("poison")
    journal.begin("waits", NODE)
    assert journal.begin("waits", NODE).mode == "together"
    assert journal.begin("poison", NODE).mode == "alone"


def test_the_death_of_a_node_is_not_charged_to_documents() -> None:
    journal = start(alive=False)
    for _ in range(5):
        die(journal, "s", 0)
    attempt = journal.begin("s", NODE)
    assert attempt.mode == "together"
    assert attempt.deadly == frozenset()


def test_the_node_that_is_asked_about_is_the_one_where_the_shard_ran() -> None:
    asked = []
    journal = Journal(lambda node_id: asked.append(node_id) is None)
    for node_id in ("first", "second", "third"):
        journal.begin("s", node_id)
        journal.enter("s")
    assert asked == ["first", "second"]


def test_a_document_that_kills_twice_alone_is_deadly_and_others_are_not() -> None:
    journal = start()
    die(journal, "s")
    die(journal, "s")
    die(journal, "s", 7)
    assert journal.begin("s", NODE).deadly == frozenset()
    journal.enter("s")
    journal.begin_document("s", 6)
    journal.begin_document("s", 7)
    assert journal.begin("s", NODE).deadly == {7}


def test_deaths_while_alone_are_counted_for_each_document_apart() -> None:
    journal = start()
    die(journal, "s")
    die(journal, "s")
    for document in (1, 2, 1, 3, 2):
        die(journal, "s", document)
    assert journal.begin("s", NODE).deadly == {1, 2}


def test_a_death_after_the_commit_is_nobodys_fault() -> None:
    journal = start()
    die(journal, "s")
    journal.end("s")
    assert journal.begin("s", NODE).mode == "together"
    assert journal.state()["num_deaths"] == 0


def test_a_shard_that_kills_without_end_stops_the_job_with_its_name() -> None:
    journal = start()
    for done in range(MAX_SHARD_DEATHS + 1):
        die(journal, "s")
        answer_documents(journal, done + 1)
    with pytest.raises(
        InfrastructureError, match=f"Shard s killed its worker {MAX_SHARD_DEATHS + 1} times"
    ):
        journal.begin("s", NODE)


def test_deaths_with_no_answer_between_them_are_not_blamed_on_documents_for_ever() -> None:
    journal = start()
    for _ in range(MAX_DEATHS_IN_A_ROW + 1):
        die(journal, "s")
        answer_documents(journal, 0)
    with pytest.raises(InfrastructureError, match="times in a row"):
        journal.begin("s", NODE)


def test_every_document_of_a_small_shard_may_be_deadly_before_the_job_stops() -> None:
    journal = start()
    die(journal, "s")
    die(journal, "s")
    for document in range(29):
        die(journal, "s", document)
        die(journal, "s", document)
        answer_documents(journal, document + 1)
    assert journal.begin("s", NODE).deadly == frozenset(range(29))


def test_while_draining_no_shard_begins_and_those_that_run_end() -> None:
    journal = start()
    journal.begin("runs", NODE)
    journal.drain()
    assert journal.begin("new", NODE).mode == "skip"
    assert journal.state()["num_running"] == 1
    journal.end("runs")
    assert journal.state()["num_running"] == 0


def test_a_shard_whose_worker_dies_while_draining_is_not_waited_for() -> None:
    journal = start()
    die(journal, "s")
    journal.drain()
    assert journal.begin("s", NODE).mode == "skip"
    assert journal.state()["num_running"] == 0


def test_an_end_that_is_told_twice_or_of_an_unknown_shard_changes_nothing() -> None:
    journal = start()
    journal.begin("s", NODE)
    journal.end("s")
    journal.end("s")
    journal.end("never begun")
    assert journal.state()["num_running"] == 0


def test_counts_are_summed_over_processes_and_replicas_counted_once() -> None:
    journal = start()
    journal.report("a", "process-1", counts(documents=3, prompt_tokens=10), 0)
    journal.report("b", "process-2", counts(documents=4, failed=1), 0)
    journal.report("a", "process-1", counts(documents=5, prompt_tokens=20), 0)
    journal.report("a", "process-9", counts(documents=1, completion_tokens=7), 0)
    state = journal.state()
    assert state["counts"] == counts(10, 1, 20, 7)
    assert state["replicas"] == 2


def test_a_process_whose_place_another_has_taken_is_told_that_it_is_not_wanted() -> None:
    journal = start()
    assert journal.report("a", "first", counts(), 0)
    assert journal.report("a", "second", counts(), 0)
    assert not journal.report("a", "first", counts(), 1)
    assert journal.report("a", "second", counts(), 1)
    assert journal.report("b", "third", counts(), 0)


def test_whatever_a_replica_tells_is_a_sign_of_life() -> None:
    journal = start()
    signs = [journal.state()["num_signs"]]
    for tell in (
        lambda: journal.begin("s", NODE),
        lambda: journal.enter("s"),
        lambda: journal.begin_document("s", 0),
        lambda: journal.report("a", "process-1", counts(), 0),
        lambda: journal.leave("s"),
        journal.show_life,
        lambda: journal.end("s"),
        lambda: journal.give_up("it hangs"),
    ):
        tell()
        signs.append(journal.state()["num_signs"])
    assert signs == sorted(set(signs))
    assert journal.state()["num_signs"] == signs[-1]


def are_signs(journal: Journal, *reports: tuple[str, dict[str, int], int]) -> list[bool]:
    """For each report of a replica, whether it counts as a sign of life."""
    found = []
    for replica_id, live, num_steps in reports:
        before = journal.state()["num_signs"]
        journal.report(replica_id, "process-1", live, num_steps)
        found.append(journal.state()["num_signs"] > before)
    return found


IDLE = ("idle", counts(), 0)


def test_a_report_alone_is_a_sign_of_life_until_a_shard_is_in_an_engine() -> None:
    journal = start()
    assert are_signs(journal, IDLE, IDLE) == [True, True]
    journal.begin("s", NODE)
    assert are_signs(journal, IDLE, IDLE) == [True, True], "it still waits for its place"
    journal.enter("s")
    assert are_signs(journal, IDLE, IDLE) == [False, False]
    assert journal.state()["num_in_engine"] == 1


def test_from_then_on_steps_and_counts_and_a_new_replica_are_signs_of_life() -> None:
    journal = start()
    are_signs(journal, IDLE, ("busy", counts(), 7))
    journal.begin("s", NODE)
    journal.enter("s")
    reports = [
        ("busy", counts(), 7),
        ("busy", counts(), 8),
        IDLE,
        ("busy", counts(documents=1), 8),
        ("busy", counts(documents=1), 8),
        ("new", counts(), 0),
        ("new", counts(), 0),
    ]
    assert are_signs(journal, *reports) == [False, True, False, True, False, True, False]


def test_a_shard_that_has_left_its_engine_may_take_long_to_be_committed() -> None:
    journal = start()
    for shard_id in ("s", "other"):
        journal.begin(shard_id, NODE)
        journal.enter(shard_id)
    are_signs(journal, IDLE)
    journal.leave("s")
    assert are_signs(journal, IDLE) == [False], "the other is still in there"
    journal.leave("other")
    assert are_signs(journal, IDLE, IDLE) == [True, True]
    assert journal.state()["num_running"] == 2


def test_a_commit_at_work_does_not_hide_an_engine_that_hangs() -> None:
    journal = start()
    die(journal, "s")
    before = journal.state()["num_signs"]
    journal.show_life()
    assert journal.state()["num_signs"] == before
    journal.leave("s")
    journal.show_life()
    assert journal.state()["num_signs"] == before + 2


def test_a_death_while_a_shard_s_table_is_built_is_charged_to_it() -> None:
    journal = start()
    for mode in ("together", "alone", "one_by_one"):
        assert journal.begin("s", NODE).mode == mode
        journal.enter("s")
        journal.leave("s")


@pytest.mark.parametrize("alive", [True, False])
def test_a_shard_of_a_lost_replica_is_in_no_engine_from_its_next_beginning_on(alive: bool) -> None:
    journal = start(alive)
    die(journal, "s")
    are_signs(journal, IDLE)
    assert are_signs(journal, IDLE) == [False], "somebody must take it up in time"
    journal.begin("s", NODE)
    assert are_signs(journal, IDLE) == [True]


def test_neither_a_skipped_shard_nor_one_that_ended_is_in_an_engine() -> None:
    journal = start()
    die(journal, "skipped")
    die(journal, "ended")
    journal.drain()
    journal.begin("skipped", NODE)
    journal.end("ended")
    journal.enter("ended")  # its first replica was cut off, and comes back
    assert journal.state()["num_in_engine"] == 0
    assert are_signs(journal, IDLE, IDLE) == [True, True]


def test_the_end_of_a_job_names_what_the_last_replica_said_of_its_end() -> None:
    journal = start()
    for _ in range(MAX_DEATHS_IN_A_ROW + 1):
        die(journal, "s")
    journal.give_up("The engine hangs.")
    with pytest.raises(
        InfrastructureError, match=r"between\. The last .* said: The engine hangs\. L"
    ):
        journal.begin("s", NODE)


def test_an_answer_makes_old_last_words_void() -> None:
    journal = start()
    journal.give_up("It has lost its way")
    answer_documents(journal, 1)
    for _ in range(MAX_DEATHS_IN_A_ROW + 1):
        die(journal, "s")
    with pytest.raises(InfrastructureError, match=r"between\. Look"):
        journal.begin("s", NODE)


def test_why_a_replica_could_not_start_is_told_on() -> None:
    journal = start()
    assert journal.state()["start_error"] is None
    error = ConfigError("engine.device is cuda, but there is none")
    journal.cannot_start(error)
    assert journal.state()["start_error"] is error
