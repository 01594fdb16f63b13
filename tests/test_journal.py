import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from hyperfunc import journal
from hyperfunc.journal import Journal, go_on, number_of, read_rows, run_of, until, write_rows


def rows_of_a_run(run: str = "r", epochs: int = 3) -> list[dict[str, Any]]:
    """Two reports an epoch, at steps 1, 2 and so on."""
    rows: list[dict[str, Any]] = [{"kind": "start", "run": run}]
    for epoch in range(1, epochs + 1):
        rows += [{"kind": "report", "epoch": epoch, "step": 2 * epoch - 1, "loss": 0.5}]
        rows += [{"kind": "report", "epoch": epoch, "step": 2 * epoch, "loss": 0.25}]
        rows += [{"kind": "epoch", "epoch": epoch, "step": 2 * epoch, "test/accuracy": 50.0}]
    return rows


def complain(line: str) -> None:
    raise AssertionError(line)


def test_rows_are_lines_of_json_with_the_time(tmp_path: Path) -> None:
    path = tmp_path / "run.metrics.jsonl"
    writer = Journal(path, complain)
    writer.write("start", {"run": "abc"})
    writer.write("report", {"step": 1, "path": "\udcff ü"})
    first, second = read_rows(path)
    assert (first["kind"], first["run"]) == ("start", "abc")
    assert (second["step"], second["path"]) == (1, "\udcff ü")
    assert second["time"] >= first["time"] > 1e9
    assert [json.loads(line) for line in path.read_text().splitlines()] == [first, second]
    assert run_of([first, second]) == "abc"


def test_a_row_is_written_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(os, "write", lambda _descriptor, content: written.append(content) or len(content))
    Journal(tmp_path / "j", complain).write("event", {"text": "x" * 100_000})
    assert len(written) == 1
    assert written[0].endswith(b"\n")


@pytest.mark.parametrize("step", range(7))
def test_a_file_cut_at_any_byte_is_read_and_gone_on_with(tmp_path: Path, step: int) -> None:
    path = tmp_path / "run.metrics.jsonl"
    rows = rows_of_a_run()
    write_rows(path, rows)
    whole = path.read_bytes()
    history = [{k: v for k, v in row.items() if k != "kind"} for row in rows if row["kind"] == "epoch"]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        read_rows(path)
        epoch = step // 2
        found, _ = go_on(path, "r", step=step, epoch=epoch, history=history[:epoch], warn=pytest.fail)
        assert read_rows(path) == found
        # Whatever the cut took away, every epoch is there once, and nothing of what comes.
        assert sorted(row["epoch"] for row in found if row["kind"] == "epoch") == list(range(1, epoch + 1))
        steps = [row["step"] for row in found if row["kind"] == "report"]
        assert steps == sorted(set(steps))
        assert all(s <= step for s in steps)
        assert run_of(found) == "r"


def test_what_will_be_done_again_is_cut_off() -> None:
    rows = [*rows_of_a_run(), {"kind": "event", "event": "stopped"}]
    kept = until(rows, step=4, epoch=1)
    assert [(row["kind"], row.get("step")) for row in kept] == [
        ("start", None),
        ("report", 1),
        ("report", 2),
        ("epoch", 2),
        ("report", 3),
        ("report", 4),
        ("event", None),
    ]


def test_the_journal_is_found_again_after_a_run_that_came_to_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.metrics.jsonl"
    write_rows(tmp_path / "run.1.metrics.jsonl", rows_of_a_run("old"))
    write_rows(path, rows_of_a_run("new", epochs=1))
    found, before = go_on(path, "old", step=4, epoch=2, history=[], warn=pytest.fail)
    assert before == rows_of_a_run("old")
    assert found == rows_of_a_run("old", epochs=2) == read_rows(path)
    others = sorted(other.name for other in tmp_path.iterdir())
    # It is copied: under that name it may by now be the journal of a run at run.1.pth.
    assert others == ["run.1.metrics.jsonl", "run.2.metrics.jsonl", "run.metrics.jsonl"]
    assert run_of(read_rows(tmp_path / "run.2.metrics.jsonl")) == "new"


def test_of_several_that_were_moved_aside_the_longest_is_found(tmp_path: Path) -> None:
    """With numbers missing between them, which other files of the run may have taken."""
    path = tmp_path / "run.metrics.jsonl"
    write_rows(path, rows_of_a_run("new", epochs=1))
    for number, epochs in ((2, 1), (5, 3), (11, 2)):
        write_rows(tmp_path / f"run.{number}.metrics.jsonl", rows_of_a_run("old", epochs=epochs))
    write_rows(tmp_path / "runs.7.metrics.jsonl", rows_of_a_run("old", epochs=4))
    _, before = go_on(path, "old", step=100, epoch=3, history=[], warn=pytest.fail)
    assert before == rows_of_a_run("old", epochs=3)
    assert number_of(path, "old") == 2
    assert number_of(path, "nobody") is None


def test_a_lost_or_foreign_journal_is_made_up_for_by_the_history(tmp_path: Path) -> None:
    path = tmp_path / "run.metrics.jsonl"
    history = [{"epoch": 1, "step": 2, "test/accuracy": 50.0}]
    for content in (None, b"", b"not a journal\n"):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        found, _ = go_on(path, "r", step=2, epoch=1, history=history, warn=pytest.fail)
        assert found == read_rows(path) == [{"kind": "start", "run": "r"}, {"kind": "epoch", **history[0]}]
    assert (tmp_path / "run.2.metrics.jsonl").read_bytes() == b"not a journal\n"


def test_what_could_not_be_cut_off_on_a_full_disk_is_cut_off_by_the_next_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.metrics.jsonl"
    whole = rows_of_a_run("r", epochs=3)
    again = [{**row, "again": True} for row in whole if row["kind"] != "start" and row.get("epoch", 9) > 1]
    # After the first epoch, and with a report at another step than before.
    again = [
        {**row, "step": 4} if row.get("step") == 3 else row
        for row in again
        if row["kind"] == "epoch" or row["step"] != 4
    ]
    write_rows(path, [*whole, {"kind": "resume", "run": "r", "step": 2, "epoch": 1}, *again])
    found, _ = go_on(path, "r", step=10**6, epoch=3, history=[], warn=pytest.fail)
    assert [row["step"] for row in found if row["kind"] == "report"] == [1, 2, 4, 5, 6]
    assert [(row["epoch"], "again" in row) for row in found if row["kind"] == "epoch"] == [
        (1, False),
        (2, True),
        (3, True),
    ]


def test_the_journal_of_another_run_is_left_alone(tmp_path: Path) -> None:
    """A checkpoint that was copied has the id of the run that it is a copy of."""
    write_rows(tmp_path / "run.metrics.jsonl", rows_of_a_run("r"))
    before = (tmp_path / "run.metrics.jsonl").read_bytes()
    go_on(tmp_path / "run.copy.metrics.jsonl", "r", step=2, epoch=1, history=[{"epoch": 1}], warn=pytest.fail)
    assert (tmp_path / "run.metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("bad", ["x", "[1]", "{}", '{"kind":"epoch"}', '{"kind":"report","step":"1"}', "[" * 10**5])
def test_lines_that_are_no_rows_are_left_out_and_said_to_be(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "run.metrics.jsonl"
    write_rows(path, rows_of_a_run("r"))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], bad, *lines[2:], ""]))
    with pytest.raises(ValueError, match=r"run\.metrics\.jsonl is not a journal of a run: line 3 is not a row of one"):
        read_rows(path)
    told: list[str] = []
    found, _ = go_on(path, "r", step=10**6, epoch=10**6, history=[], warn=told.append)
    assert found == rows_of_a_run("r")
    assert told == [f"{path}: 1 lines that are no rows of a journal were left out"]


def test_what_a_full_disk_refuses_is_written_later(tmp_path: Path) -> None:
    path = tmp_path / "j"
    told: list[str] = []
    writer = Journal(path, told.append)
    writer.write("event", {"n": 0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # In the middle of the second row.
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
    try:
        writer.write("event", {"n": 1})
        writer.write("event", {"n": 2})
        assert [row["n"] for row in read_rows(path)] == [0]
        assert path.read_bytes().endswith(b"\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.write("event", {"n": 3})
    assert [row["n"] for row in read_rows(path)] == [0, 1, 2, 3]
    assert len(told) == 1
    assert told[0].startswith(f"could not write {path}: ")


def test_a_file_that_is_no_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j"
    for content in ("{}\n", "[1]\n", "{\n", '{"kind": 3}\n', "\n"):
        path.write_text('{"kind":"start"}\n' + content)
        with pytest.raises(ValueError, match="j is not a journal of a run: line 2 is not a row of one"):
            read_rows(path)
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "nothing")


def test_the_ending_of_a_journals_name() -> None:
    assert journal.ENDING == ".metrics.jsonl"
