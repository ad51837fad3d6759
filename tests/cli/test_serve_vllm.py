"""`overture serve --engine vllm`, as far as it goes before vLLM starts (tests/vllm goes on from there)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

import overture.cli.serve as command

from .conftest import Run
from .test_bad_input import check


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_it_says_what_to_install(run: Run) -> None:
    check(run("serve", "--engine", "vllm"), 2, "no vllm", "overture[vllm]")


def test_options_that_vllm_would_not_heed_are_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: name)
    given = ("serve", "--engine", "vllm", "--store", str(tmp_path), "--rows", "4", "--queue", "3")
    check(run(*given, "--drain-seconds", "2"), 2, "queue, drain_seconds")
    check(run(*given[:3], "--device", "cpu", "--cache-mb", "64"), 2, "--device, --cache-mb", "--vllm=")


def test_options_of_vllm_are_refused_without_it(run: Run) -> None:
    check(run("serve", "--vllm=--tensor-parallel-size=2"), 2, "--vllm", "--engine vllm")
