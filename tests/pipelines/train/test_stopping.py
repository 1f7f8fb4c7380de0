import os
import signal
import threading
import time
from contextlib import suppress

import pytest
from torch import distributed

from pipelines.train import stopping
from pipelines.train.stopping import Notices, StopRequest, stop_on_sigterm


class Method:
    """A method of an actor, as far as it is called here."""

    def __init__(self, call):
        self.remote = call


class Actor:
    """A stop request in this process. Without a worker nobody asks it."""

    def __init__(self, *, has_worker):
        self.request, self.has_worker = StopRequest(), has_worker
        self.ask, self.is_asked, self.is_seen = (
            Method(self.request.ask),
            Method(self.request.is_asked),
            Method(self._seen),
        )

    def _seen(self):
        if self.has_worker:
            self.request.is_asked()
        return self.request.is_seen()


@pytest.fixture(autouse=True)
def _answers(monkeypatch):
    """Calls of an Actor are answered at once."""
    monkeypatch.setattr(stopping.ray, "get", lambda answer: answer)


@pytest.fixture
def handlers():
    """Those of both signals before, and after the test again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def now(handlers):
    return {number: signal.getsignal(number) for number in handlers}


def wait_until(condition):
    deadline = time.monotonic() + 10.0
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def num_threads(of):
    return sum(f"({of})" in thread.name for thread in threading.enumerate())


def test_request_is_seen_when_a_worker_has_asked_after_it():
    request = StopRequest()
    assert not request.is_asked()
    request.ask()
    assert not request.is_seen()
    assert request.is_asked()
    assert request.is_seen()


def run_inside(actor, work):
    with stop_on_sigterm(actor):
        work()


def terminate(times=1):
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20.0)


def test_sigterm_asks_for_a_stop_and_a_second_one_ends_the_process(handlers):
    actor = Actor(has_worker=True)
    with stop_on_sigterm(actor):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(actor.request.is_seen)
    assert now(handlers) == handlers
    with pytest.raises(SystemExit) as stop:
        run_inside(actor, lambda: terminate(times=2))
    assert stop.value.code == 143
    assert now(handlers) == handlers


def test_request_that_no_worker_sees_ends_the_process(handlers, monkeypatch):
    monkeypatch.setattr(stopping, "UNSEEN_SECONDS", 1.0)
    actor = Actor(has_worker=False)
    began = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        run_inside(actor, terminate)
    assert stop.value.code == 143
    assert time.monotonic() - began >= 1.0
    assert actor.request.is_asked()


def test_lost_call_is_made_again(handlers, monkeypatch):
    actor, failures = Actor(has_worker=True), [stopping.RayError(), stopping.RayError()]

    def get(answer):
        if failures:
            raise failures.pop()
        return answer

    monkeypatch.setattr(stopping.ray, "get", get)
    with stop_on_sigterm(actor):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: not failures and actor.request.is_seen())


def test_work_that_ends_before_a_worker_has_seen_the_request_ends_as_it_would(handlers):
    def work():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)

    run_inside(Actor(has_worker=False), work)
    assert now(handlers) == handlers


def test_request_that_was_seen_has_all_the_time_that_a_checkpoint_takes(handlers):
    def work():
        assert num_threads("tell") == 1
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: num_threads("tell") == 0)  # nobody is left to end the process

    run_inside(Actor(has_worker=True), work)
    assert now(handlers) == handlers


def test_work_that_ends_unasked_asks_nobody(handlers, caplog):
    actor = Actor(has_worker=True)
    with stop_on_sigterm(actor):
        pass
    assert not actor.request.is_asked()
    assert "asked to stop" not in caplog.text
    assert now(handlers) == handlers


def test_rays_end_at_an_interrupt_is_an_interrupt_and_other_ends_stay(handlers):
    def end(code):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as Ray takes it over
        raise SystemExit(code)

    with pytest.raises(KeyboardInterrupt):
        run_inside(Actor(has_worker=True), lambda: end(0))
    assert now(handlers) == handlers
    with pytest.raises(SystemExit) as stop:
        run_inside(Actor(has_worker=True), lambda: end(3))
    assert stop.value.code == 3


@pytest.fixture(scope="module")
def _group(tmp_path_factory):
    """A process group of this process alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/meeting", rank=0, world_size=1
        )
        yield
        distributed.destroy_process_group()
        with suppress(KeyError):
            del os.environ["GLOO_SOCKET_IFNAME"]


@pytest.fixture
def machines(monkeypatch):
    """What Ray knows of machines that go, and when it was asked."""
    known = {"info": None, "asked": 0}

    def info():
        known["asked"] += 1
        return known["info"]

    monkeypatch.setattr(stopping.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(stopping.ray.train, "get_preemption_info", info)
    return known


@pytest.mark.usefixtures("_group", "machines")
@pytest.mark.parametrize("rank", [0, 1])
def test_first_worker_tells_of_a_stop_a_step_after_it_heard(monkeypatch, rank):
    monkeypatch.setattr(stopping, "ASK_SECONDS", 0.02)
    actor = Actor(has_worker=True)
    found = Notices(actor, rank)
    assert found.look() == (False, False)
    assert num_threads("_listen") == (rank == 0)  # one alone asks
    actor.request.ask()
    wait_until(lambda: found._stop_asked.is_set() or rank == 1)
    assert found.look() == (False, False)
    assert found.look() == (rank == 0, False)
    found.close()
    wait_until(lambda: num_threads("_listen") == 0)


@pytest.mark.usefixtures("_group", "machines")
def test_run_that_ends_unasked_is_no_longer_listened_for(monkeypatch):
    monkeypatch.setattr(stopping, "ASK_SECONDS", 0.02)
    found = Notices(Actor(has_worker=True), 0)
    found.look()
    found.close()
    wait_until(lambda: num_threads("_listen") == 0)


@pytest.mark.usefixtures("_group")
def test_ray_is_asked_about_machines_at_intervals_and_its_news_are_told_once(monkeypatch, machines):
    clock = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    found = Notices(None, 0)

    def told_after(seconds):
        clock[0] += seconds
        found.look()
        return found.look()[1]

    assert not told_after(4.0)
    assert machines["asked"] == 0
    assert not told_after(2.0)
    assert machines["asked"] == 1
    machines["info"] = {"node": "a"}
    assert not told_after(4.0)
    assert machines["asked"] == 1
    assert told_after(2.0)
    assert machines["asked"] == 2
    assert not told_after(6.0)  # known
    machines["info"] = {"node": "a", "another": "b"}
    assert told_after(6.0)
    machines["info"] = None
    assert not told_after(6.0)
    found.close()
