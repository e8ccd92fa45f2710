"""The process from which workers are forked: its contents, and what a worker inherits."""

from __future__ import annotations

import os
from contextlib import closing

import psutil
import pytest

from running.executors.toys import Tells
from streammerge.running.executors.processes import ProcessExecutor


def test_workers_are_forks_of_one_clean_process() -> None:
    with closing(ProcessExecutor(3)) as executor:
        told = list(executor.run(Tells(), range(60)))
        assert len({each["pid"] for each in told}) == 3
        assert len({each["parent"] for each in told}) == 1
        assert told[0]["parent"] != os.getpid()
        assert psutil.Process(told[0]["parent"]).ppid() == os.getpid()
        assert all(each["interrupt"] and each["torch"] is None and each["main"] is None for each in told)
        assert all(each["group"] != os.getpgrp() for each in told), "Ctrl-C of a terminal does not reach them"
        assert {each["pid"] for each in executor.run(Tells(), range(60))} == {each["pid"] for each in told}


def test_modules_are_imported_before_the_fork() -> None:
    with closing(ProcessExecutor(2)) as executor:
        first = {each["pid"] for each in executor.run(Tells(), range(30))}
        told = list(executor.run(Tells(("torch",)), range(30)))
        assert {each["torch"] for each in told} == {1}, "with one thread for each worker"
        assert first.isdisjoint(each["pid"] for each in told), "forked again, since a module was wanted"
        assert {each["pid"] for each in executor.run(Tells(), range(30))} == {each["pid"] for each in told}


def test_a_module_that_cannot_be_imported() -> None:
    with closing(ProcessExecutor(2)) as executor, pytest.raises(ModuleNotFoundError, match="no_such_module"):
        list(executor.run(Tells(("no_such_module",)), range(3)))
