"""`overture tune-many`. Oracle: `overture tune` on each user's rows alone, by the same options."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from overture.cli._reporting import Shortlist
from overture.prompt import SoftPrompt
from overture.report import PromptSummary
from overture.store import PromptStore

from .conftest import ROWS, Run, started, write_rows
from .test_bad_input import check

FEW = ["--steps", 3, "--tokens", 2, "--batch-size", 2, "--option", "reparameterization=false"]
WORDS = {"ada": "one", "bob": "two", "cy": "six"}


def rows_of(user: str) -> list[dict[str, Any]]:
    """24 rows, another for each user."""
    return [{**row, "completion": f"{WORDS[user]} {row['completion']}"} for row in ROWS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A file for each user."""
    (tmp_path / "users").mkdir()
    for user in WORDS:
        write_rows(tmp_path / "users" / f"{user}.jsonl", rows_of(user))
    return tmp_path / "users"


def stored(place: Path) -> dict[str, SoftPrompt]:
    with PromptStore(place, create=False, read_only=True) as store:
        return {tenant: store.get(tenant, "prompt") for tenant in store.tenants()}


def files(place: Path) -> dict[str, str]:
    """The digest of each user's prompt file."""
    with PromptStore(place, create=False, read_only=True) as store:
        return {record.tenant: record.sha256 for record in store.search()}


def test_each_user_gets_the_prompt_of_tuning_alone(run: Run, llama: Path, folder: Path, tmp_path: Path) -> None:
    done = run("tune-many", "--data", folder, "--store", tmp_path / "s", "--model", llama, *FEW, "--slots", 2, "--json")
    assert (done.code, done.err) == (0, ""), done
    found = done.document
    assert (found["done"], found["done_before"], found["failed"], found["left_out"]) == (3, 0, {}, 0)
    prompts = stored(tmp_path / "s")
    assert set(prompts) == set(WORDS) == set(found["users"])
    for user, prompt in prompts.items():
        out = tmp_path / f"{user}.safetensors"
        assert run("tune", folder / f"{user}.jsonl", "--model", llama, *FEW, "--out", out, "--quiet").code == 0
        alone = SoftPrompt.load(out)
        assert prompt.name == user
        assert found["users"][user]["loss_after"] == prompt.metrics["loss"]
        for key, tensor in alone.value.tensors().items():
            # fp32 sums over other batch shapes: a few units in the last place of values around 1, three steps on.
            assert (tensor - prompt.value.tensors()[key]).abs().max() < 1e-4
    ada, bob = (prompts[user].value.tensors() for user in ("ada", "bob"))
    assert all((ada[key] - bob[key]).abs().max() > 1e-2 for key in ada)  # each its own, far beyond that tolerance


def test_a_table_is_as_good_as_a_folder(run: Run, llama: Path, folder: Path, tmp_path: Path) -> None:
    mixed = [{"speaker": user, "n": i, **row} for i in range(24) for user in WORDS for row in [rows_of(user)[i]]]
    table = write_rows(tmp_path / "table.jsonl", mixed)
    for data, store in ((folder, "a"), (table, "b")):
        assert run("tune-many", "--data", data, "--store", tmp_path / store, "--model", llama, *FEW, "-q").code == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_the_summary_says_what_was_made_and_what_to_try(run: Run, llama: Path, folder: Path, tmp_path: Path) -> None:
    write_rows(folder / "small.jsonl", ROWS[:2])
    (folder / "notes.txt").touch()
    place = tmp_path / "my store"
    words = [
        "tune-many",
        "--data",
        folder,
        "--store",
        place,
        "--model",
        llama,
        *FEW,
        "--min-rows",
        3,
        "--name",
        "voice",
    ]
    done = run(*words)
    assert done.code == 0, done.err
    for text in ("3 users", "users per minute", "before", f"USER/voice in {place}", f"--store '{place}'"):
        assert text in done.out
    for text in ("1 left out", "notes.txt", "3 done of 3"):
        assert text in done.err
    assert "\x1b" not in done.err
    listed = run("store", "ls", "--store", place)
    assert listed.code == 0
    assert "ada/voice" in listed.out


def test_the_report_shows_every_user_and_who_gained_least_first(
    run: Run, llama: Path, folder: Path, tmp_path: Path
) -> None:
    """Oracle: the losses in the command's own document."""
    page = tmp_path / "users.html"
    words = ["tune-many", "--data", folder, "--store", tmp_path / "s", "--model", llama, *FEW, "--report", page]
    done = run(*words, "--json")
    assert done.code == 0, done.err
    assert done.document["report"] == str(page)
    users = done.document["users"]
    ordered = sorted(users, key=lambda user: users[user]["loss_before"] - users[user]["loss_after"])
    text = page.read_text()
    places = [text.index(f"<th>{user}</th>") for user in ordered]
    assert places == sorted(places)
    assert "each of 3 users" in text
    assert run(*words, "--resume", "--json").document["done_before"] == 3
    assert "3 users were done before" in page.read_text()
    check(run(*words[:-1], tmp_path / "none" / "users.html"), 2, "existing folder")


def test_a_page_of_many_users_keeps_those_who_gained_least() -> None:
    """Oracle: all of them, sorted."""
    gains = [(7 * number) % 50 for number in range(50)]
    shortlist = Shortlist(room=4)
    for number, gain in enumerate(gains):
        shortlist.add(
            PromptSummary(
                name=f"{number}",
                method="prefix",
                virtual_tokens=1,
                trained_parameters=1,
                stored_parameters=1,
                base_parameters=1,
                loss_before=100.0,
                loss_after=100.0 - gain,
                seconds=1.0,
            )
        )
    assert shortlist.count == 50
    assert [gains[int(one.name)] for one in shortlist.prompts] == sorted(gains)[:4]


def test_bad_users_fail_alone_and_can_be_made_up_for(run: Run, llama: Path, folder: Path, tmp_path: Path) -> None:
    write_rows(folder / "empty.jsonl", [])
    write_rows(folder / "long.jsonl", [{"prompt": "word " * 400, "completion": "x"}])
    (folder / "torn.jsonl").write_text('{"prompt": "a"')
    words = ["tune-many", "--data", folder, "--store", tmp_path / "s", "--model", llama, *FEW]
    words += ["--run-dir", tmp_path / "run"]
    done = run(*words)
    assert done.code == 6
    for text in ("3 users", "failed: empty", "no rows in", "failed: long", "tokens", "failed: torn", "torn.jsonl:1"):
        assert text in done.out, text
    assert all(f" {part}  " in done.out for part in ("expected", "got", "do"))
    assert set(stored(tmp_path / "s")) == set(WORDS)
    for user in ("empty", "long", "torn"):
        write_rows(folder / f"{user}.jsonl", ROWS[:4])
    again = run(*words, "--resume", "--json")
    assert again.code == 0, again.out
    assert (again.document["done"], again.document["done_before"]) == (3, 3)
    assert set(again.document["users"]) == {"empty", "long", "torn"}


def test_whose_rows_changed_is_tuned_again(run: Run, llama: Path, folder: Path, tmp_path: Path) -> None:
    words = ["tune-many", "--data", folder, "--store", tmp_path / "s", "--model", llama, *FEW, "--json"]
    assert run(*words).document["done"] == 3
    write_rows(folder / "bob.jsonl", rows_of("bob")[:20])
    assert set(run(*words, "--resume").document["users"]) == {"bob"}
    assert run(*words, "--resume").document["users"] == {}
    assert run(*words, "--resume", "--seed", 1).document["done"] == 3  # another run: nobody was done


def test_held_out_rows_of_their_own(run: Run, llama: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    for user in ("ada", "stranger"):
        write_rows(tmp_path / "dev" / f"{user}.jsonl", ROWS[:5])
    words = ["tune-many", "--data", folder, "--dev", tmp_path / "dev", "--store", tmp_path / "s", "--model", llama]
    assert run(*words, *FEW, "--quiet").code == 0
    prompts = stored(tmp_path / "s")
    assert {user: p.metrics["dev_rows"] for user, p in prompts.items()} == {"ada": 5, "bob": 2, "cy": 2}


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--data", "nowhere"], 3, ["nowhere"]),
        (["--min-rows", 100], 3, ["none of 3", "--min-rows"]),
        (["--user-column", "speaker"], 2, ["'speaker'"]),
        (["--name", "a/b"], 2, ["prompt name"]),
        (["--method", "prefxi"], 2, ["prefix"]),
        (["--slots", 0], 2, ["--slots"]),
        (["--tokens", 1000], 5, ["128"]),
    ],
)
def test_wrong_options(
    run: Run, llama: Path, folder: Path, tmp_path: Path, more: list[Any], code: int, words: list[str]
) -> None:
    outcome = run("tune-many", "--data", folder, "--store", tmp_path / "s", "--model", llama, "-q", *FEW, *more)
    check(outcome, code, *words)


def test_a_missing_folder_is_refused_before_anything_heavy() -> None:
    code = "import sys\nfrom overture.cli import main\ncode = main(['tune-many', '--data', 'nowhere'])\n"
    code += "sys.exit(99 if 'torch' in sys.modules else code)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 3


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_goes_on_and_repeats_nobody(
    run: Run, llama: Path, folder: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    """Oracle: the same run, not stopped. Each user's prompt must be the same bytes, and be published once."""
    words = ["tune-many", "--data", folder, "--model", llama, "--steps", 60, "--tokens", 2, "--slots", 1]
    words += ["--option", "checkpoint_every=2", "--option", "reparameterization=false"]
    place, work = tmp_path / "s", tmp_path / "run"
    command = [*map(str, words), "--store", str(place), "--run-dir", str(work)]
    process = started(command)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if list(place.rglob("*.safetensors")) and files(place):
            break
        time.sleep(0.05)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    if sent is signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130, errors
        assert f"--run-dir {work} --resume" in errors
        assert "Traceback" not in errors
    before = set(stored(place))
    assert len(before) in (1, 2)  # the point of the test: not all, and not none
    done = run(*command, "--resume", "--json")
    assert done.code == 0, done.out
    assert set(done.document["users"]) == set(WORDS) - before
    assert run(*words, "--store", tmp_path / "whole", "--quiet").code == 0
    assert files(place) == files(tmp_path / "whole")
    with PromptStore(place, read_only=True) as store:
        assert {record.version for record in store.search(all_versions=True)} == {1}


def test_kill_without_a_run_folder_leaves_those_who_are_done(
    run: Run, llama: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from overture.cli import _publishing

    publish = _publishing.Publisher.__call__

    def interrupted(self: Any, result: Any) -> None:
        publish(self, result)
        os.kill(os.getpid(), signal.SIGTERM)

    words = ["tune-many", "--data", folder, "--store", tmp_path / "s", "--model", llama, *FEW, "--slots", 1]
    monkeypatch.setattr(_publishing.Publisher, "__call__", interrupted)
    done = run(*words)
    assert done.code == 130
    assert done.err.rstrip().endswith("--resume")
    monkeypatch.undo()
    assert set(run(*words, "--resume", "--json").document["users"]) == {"bob", "cy"}
    assert json.loads(run(*words, "--resume", "--json").out)["done_before"] == 3
