import os
import signal
import threading
import time
from contextlib import suppress

import pytest
from torch import distributed

from pipelines.training import stopping
from pipelines.training.stopping import SignalMonitor, Signals, StopRequest, fit_in_thread, stop_on_signals


class Method:
    """A fake actor method."""

    def __init__(self, call):
        self.remote = call


class LocalActor:
    """A fake stop-request actor in this process. Without a worker it is never polled."""

    def __init__(self, *, has_worker=True):
        self.state, self._has_worker = StopRequest(), has_worker
        self.request, self.poll = Method(self.state.request), Method(self.state.poll)
        self.is_acknowledged = Method(self._is_acknowledged)
        self.has_worker = Method(self.state.has_worker)

    def _is_acknowledged(self):
        if self._has_worker:
            self.state.poll()
        return self.state.is_acknowledged()


@pytest.fixture(autouse=True)
def _local_calls(monkeypatch):
    """Makes ray.get return the result of a LocalActor call directly."""
    monkeypatch.setattr(stopping.ray, "get", lambda result: result)


@pytest.fixture
def handlers():
    """The handlers of SIGTERM and SIGINT before the test. They are restored after it."""
    before = current_handlers()
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def current_handlers():
    return {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


def wait_until(condition):
    deadline = time.monotonic() + 10.0
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def num_threads(function):
    return sum(f"({function})" in thread.name for thread in threading.enumerate())


def run_inside(actor, work):
    with stop_on_signals(actor):
        work()


def terminate(times=1, number=signal.SIGTERM):
    for _ in range(times):
        os.kill(os.getpid(), number)
    time.sleep(20.0)


def test_stop_request_is_acknowledged_when_a_worker_polls_it():
    request = StopRequest()
    assert not request.poll()
    request.request()
    assert not request.is_acknowledged()
    assert request.poll()
    assert request.is_acknowledged()


def test_sigterm_requests_a_stop_and_a_second_one_ends_the_process(handlers):
    actor = LocalActor()
    with stop_on_signals(actor):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(actor.state.is_acknowledged)
        wait_until(lambda: num_threads("forward_request") == 0)  # no deadline for saving the checkpoint
    assert current_handlers() == handlers
    with pytest.raises(SystemExit) as stop:
        run_inside(actor, lambda: terminate(times=2))
    assert stop.value.code == 143
    assert current_handlers() == handlers


def test_process_ends_if_no_worker_acknowledges_the_request(handlers, monkeypatch):
    monkeypatch.setattr(stopping, "ACKNOWLEDGE_SECONDS", 0.5)
    actor = LocalActor(has_worker=False)
    with pytest.raises(SystemExit) as stop:
        run_inside(actor, terminate)
    assert stop.value.code == 143
    assert actor.state.poll()


def test_failed_calls_are_retried(handlers, monkeypatch):
    actor, failures = LocalActor(), [stopping.RayError(), stopping.RayError()]

    def get(result):
        if failures:
            raise failures.pop()
        return result

    monkeypatch.setattr(stopping.ray, "get", get)
    with stop_on_signals(actor):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: not failures and actor.state.is_acknowledged())


def test_training_that_finishes_before_the_acknowledgement_ends_normally(handlers):
    run_inside(LocalActor(has_worker=False), lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert current_handlers() == handlers


def test_training_without_sigterm_requests_nothing(handlers, caplog):
    actor = LocalActor()
    run_inside(actor, lambda: None)
    assert not actor.state.poll()
    assert "stop requested" not in caplog.text
    assert current_handlers() == handlers


def test_ctrl_c_requests_a_stop_and_a_second_one_interrupts(handlers):
    actor = LocalActor()
    with stop_on_signals(actor) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(actor.state.is_acknowledged)
    assert signals == [signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        run_inside(LocalActor(), lambda: terminate(times=2, number=signal.SIGINT))
    assert current_handlers() == handlers


class SlowTrainer:
    """A trainer whose worker starts after some time, or never."""

    def __init__(self, actor=None):
        self.actor = actor

    def fit(self):
        time.sleep(0.3)
        if self.actor is None:
            raise ValueError("no worker")
        self.actor.state.poll()
        time.sleep(0.3)
        return "result"


def test_waiting_for_workers_is_logged_until_the_first_one_starts(handlers, monkeypatch, caplog):
    monkeypatch.setattr(stopping, "WAITING_SECONDS", 0.1)
    actor = LocalActor(has_worker=False)
    assert fit_in_thread(SlowTrainer(actor), actor, lambda: "waiting for 2 workers") == "result"
    assert "waiting for 2 workers" in caplog.text
    with pytest.raises(ValueError, match="no worker"):
        fit_in_thread(SlowTrainer(), LocalActor(has_worker=False), lambda: "waiting")


@pytest.fixture(scope="module")
def _group(tmp_path_factory):
    """A process group with a single process."""
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
def preemption(monkeypatch):
    """The fake preemption info that Ray reports, and the number of calls."""
    reported = {"info": None, "num_calls": 0}

    def info():
        reported["num_calls"] += 1
        return reported["info"]

    monkeypatch.setattr(stopping, "BROADCAST_SECONDS", 0.0)  # broadcast after every step
    monkeypatch.setattr(stopping.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(stopping.ray.train, "get_preemption_info", info)
    return reported


@pytest.mark.usefixtures("_group", "preemption")
@pytest.mark.parametrize("rank", [0, 1])
def test_stop_request_is_delivered_one_step_after_rank_0_receives_it(monkeypatch, rank):
    monkeypatch.setattr(stopping, "STOP_POLL_SECONDS", 0.02)
    actor = LocalActor()
    monitor = SignalMonitor(actor, rank)
    assert monitor.poll() == Signals()
    assert num_threads("_poll_stop_request") == (rank == 0)  # only rank 0 polls the actor
    actor.state.request()
    wait_until(lambda: monitor._stop_requested.is_set() or rank == 1)
    assert monitor.poll() == Signals()
    assert monitor.poll() == Signals(stop_requested=rank == 0)
    monitor.close()
    wait_until(lambda: num_threads("_poll_stop_request") == 0)


@pytest.mark.usefixtures("_group", "preemption")
def test_closed_monitor_no_longer_polls(monkeypatch):
    monkeypatch.setattr(stopping, "STOP_POLL_SECONDS", 0.02)
    monitor = SignalMonitor(LocalActor(), 0)
    monitor.poll()
    monitor.close()
    wait_until(lambda: num_threads("_poll_stop_request") == 0)


@pytest.mark.usefixtures("_group", "preemption")
def test_signals_are_broadcast_at_intervals_of_time_however_short_the_steps(monkeypatch):
    clock, broadcasts = [100.0], []
    monkeypatch.setattr(stopping, "BROADCAST_SECONDS", 1.0)
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    broadcast = distributed.broadcast
    monkeypatch.setattr(
        distributed, "broadcast", lambda *args, **kwargs: broadcasts.append(clock[0]) or broadcast(*args, **kwargs)
    )
    monitor = SignalMonitor(LocalActor(), 0)

    def steps_until_stop(step_seconds, max_steps):
        for step in range(max_steps):
            clock[0] += step_seconds
            if monitor.poll().stop_requested:
                return step
        return None

    assert steps_until_stop(0.1, 300) is None
    assert 30 <= len(broadcasts) <= 33  # in 30 s
    assert steps_until_stop(0.001, 100) is None
    num_broadcasts = len(broadcasts)
    assert steps_until_stop(0.001, 100) is None
    assert len(broadcasts) == num_broadcasts + 5  # one per 20 steps: the next steps may be slow
    assert steps_until_stop(4.0, 60) is None  # the last intervals of 20 steps, then a broadcast per step
    monitor._stop_requested.set()
    assert steps_until_stop(4.0, 3) == 1
    monitor.close()


@pytest.mark.usefixtures("_group", "preemption")
def test_stop_request_from_before_the_workers_started_is_found_at_once(monkeypatch):
    monkeypatch.setattr(stopping, "STOP_POLL_SECONDS", 3600.0)
    actor = LocalActor()
    actor.state.request()
    monitor = SignalMonitor(actor, 0)
    wait_until(monitor._stop_requested.is_set)
    monitor.close()


@pytest.mark.usefixtures("_group")
def test_new_preemptions_are_announced_once_and_ray_is_called_at_intervals(monkeypatch, preemption):
    clock = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    monitor = SignalMonitor(LocalActor(), 0)

    def announced_after(seconds):
        clock[0] += seconds
        monitor.poll()
        return monitor.poll().preemption_announced

    assert not announced_after(4.0)
    assert preemption["num_calls"] == 0
    assert not announced_after(2.0)
    assert preemption["num_calls"] == 1
    preemption["info"] = {"node": "a"}
    assert not announced_after(4.0)
    assert preemption["num_calls"] == 1
    assert announced_after(2.0)
    assert not announced_after(6.0)  # known
    preemption["info"] = {"node": "a", "another": "b"}
    assert announced_after(6.0)
    preemption["info"] = None
    assert not announced_after(6.0)
    monitor.close()
