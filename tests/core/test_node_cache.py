import multiprocessing
import os
import threading
import time

import pytest

from meanflow_core import node_cache
from meanflow_core.node_cache import cached_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"meanflow-ray-generators-{os.getuid()}"


def fetch_text(text):
    return lambda folder: (folder / "text").write_text(text)


def test_processes_that_need_a_folder_at_once_fetch_it_once():
    num_fetched, found = [], []

    def fetch(folder):
        num_fetched.append(1)
        time.sleep(0.1)
        (folder / "text").write_text("content")

    threads = [threading.Thread(target=lambda: found.append(cached_folder("a", fetch))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(num_fetched) == 1
    assert len(set(found)) == 1
    assert (found[0] / "text").read_text() == "content"
    assert cached_folder("b", fetch_text("other")) != found[0]


def test_other_processes_wait_while_one_fetches(tmp_path):
    def fetch(folder):
        (tmp_path / f"fetched by {os.getpid()}").touch()
        time.sleep(0.3)

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=cached_folder, args=("a", fetch)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(tmp_path.glob("fetched by *"))) == 1


def test_an_incomplete_copy_is_never_used(monkeypatch):
    def fail(folder):
        (folder / "text").write_text("half")
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="the network is gone"):
        cached_folder("a", fail)
    with monkeypatch.context() as killed:
        killed.setattr(node_cache.shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process deletes nothing
        with pytest.raises(OSError, match="the network is gone"):
            cached_folder("a", fail)
    assert (cached_folder("a", fetch_text("whole")) / "text").read_text() == "whole"


def test_old_copies_beyond_the_most_recently_used_are_deleted(monkeypatch):
    copies = [cached_folder(str(number), fetch_text("")) for number in range(6)]
    assert all(copy.is_dir() for copy in copies)  # all were used within the hour
    for age, copy in enumerate(copies):
        os.utime(copy, (time.time() - 4000 - age,) * 2)
    assert cached_folder("5", fetch_text("")) == copies[5]
    assert [copy.is_dir() for copy in copies] == [True, True, True, False, False, True]


def test_a_cache_of_another_user_is_refused(cache, monkeypatch):
    cache.mkdir()
    owner = os.getuid()
    os.rename(cache, cache.with_name(f"meanflow-ray-generators-{owner + 1}"))
    monkeypatch.setattr(node_cache.os, "getuid", lambda: owner + 1)
    with pytest.raises(ValueError, match="another user created it"):
        cached_folder("a", fetch_text(""))
