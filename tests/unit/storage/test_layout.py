"""Paths in a run's directory, names of runs, RUN addresses."""

from __future__ import annotations

import pytest

from orchestrator.errors import UsageError
from orchestrator.storage.layout import (
    RunAddress,
    Selector,
    check_run_name,
    check_save_name,
    checkpoint_dir,
    commit_path,
    commit_sequence,
    log_path,
    manifest_path,
    name_from_script,
    parse_address,
    parse_checkpoint_dir,
    parse_selector,
    shard_path,
)


def test_paths() -> None:
    directory = checkpoint_dir(120, 3, "k7f")
    assert directory == "checkpoints/step-000000120-a0003-k7f"
    assert shard_path(directory, 12) == directory + "/rank-00012.safetensors"
    assert manifest_path(directory) == directory + "/manifest.json"
    assert parse_checkpoint_dir(directory) == (120, 3, "k7f")
    assert commit_path(17) == "commits/00000017.json"
    assert commit_sequence("commits/00000017.json") == 17 and commit_sequence("commits/17.json") is None
    assert log_path(3, 1) == "logs/a0003/rank-00001.log"


@pytest.mark.parametrize("path", ["checkpoints/x", "step-000000120-a0003-k7f", "a/checkpoints/step-000000120-a0003-k"])
def test_other_directories_are_no_checkpoints(path: str) -> None:
    assert parse_checkpoint_dir(path) is None


@pytest.mark.parametrize("name", ["train", "a", "lr=0.1", "run_2.final", "3", "x" * 100, "a+b,c", "_x"])
def test_possible_run_names(name: str) -> None:
    assert check_run_name(name) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is empty"), ("a/b", "slash"), ("..", "slash or leads"), (".", "leads"), ("../x", "slash"),
        ("a\\b", "slash"), ("x" * 101, "101 characters"), (".hidden", "must begin"), ("-x", "must begin"),
        ("a b", "must begin"), ("a@b", "must begin"), ("a\n", "must begin"), ("ü", "must begin"), ("a:b", "must begin"),
        ("a\0", "must begin"),
    ],
)  # fmt: skip
def test_impossible_run_names(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_run_name(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train", RunAddress("./runs", "train")),
        ("train@120", RunAddress("./runs", "train", Selector("step", "120"))),
        ("train@0120", RunAddress("./runs", "train", Selector("step", "120"))),
        ("runs/train@best", RunAddress("runs", "train", Selector("best"))),
        ("runs/train/", RunAddress("runs", "train")),
        ("/train", RunAddress("/", "train")),
        ("/data/all runs/train@last", RunAddress("/data/all runs", "train", Selector("last"))),
        ("file:///data/train@v1.0", RunAddress("file:///data", "train", Selector("name", "v1.0"))),
        ("s3://bucket/prefix/train", RunAddress("s3://bucket/prefix", "train")),
        ("me@host/train", RunAddress("me@host", "train")),
    ],
)
def test_addresses(text: str, expected: RunAddress) -> None:
    assert parse_address(text, "./runs") == expected


def test_an_address_says_itself() -> None:
    assert str(parse_address("train@best", "/data/")) == "/data/train@best"
    assert parse_address("/train", "x").uri == "/train"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"), ("runs/..", "leads elsewhere"), ("train@", "selects no checkpoint"),
        ("s3://bucket", "no run"), ("train@a b", "selects no checkpoint"), ("@best", "is empty"), ("a b", "must begin"),
    ],
)  # fmt: skip
def test_what_is_no_address(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_address(text, "./runs")


def test_names_of_saves_leave_selectors_alone() -> None:
    assert check_save_name("before-decay") == "before-decay"
    assert parse_selector("before-decay") == Selector("name", "before-decay")
    assert check_save_name("best") == "best"
    for name in ("last", "120", "", "a/b", "a@b", "x" * 101):
        with pytest.raises(UsageError):
            check_save_name(name)


@pytest.mark.parametrize(
    ("script", "module", "name"),
    [
        ("train.py", False, "train"), ("a/b/my train.py", False, "my-train"), ("pkg.sub.train", True, "train"),
        (".hidden.py", False, "hidden"), ("ü.py", False, "run"), ("x" * 300 + ".py", False, "x" * 94),
    ],
)  # fmt: skip
def test_a_script_gives_a_run_its_name(script: str, module: bool, name: str) -> None:
    assert name_from_script(script, module) == name and check_run_name(name) == name
