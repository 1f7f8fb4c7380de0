import asyncio
import math
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from deploy.messages import GenerationResult
from deploy.replica import serving_model
from deploy.replica.loading import load_model
from meanflow_core.generator import load_pipeline
from tests.deploy.replica.test_service import order, run, service_of
from tests.support.endpoint import Remembered


class Loads:
    """Loads models by name, slowly where asked to, and fails for those that are bad."""

    def __init__(self, bad=(), gate=None, num_free=1):
        self.bad, self.gate, self.num_free, self.asked = set(bad), gate, num_free, []

    def __call__(self, model, arguments):
        self.asked.append(model)
        if self.gate is not None and len(self.asked) > self.num_free:
            assert self.gate.wait(60)
        if model in self.bad:
            raise ValueError(f"{model} is bad")
        return load_model(model, arguments)


class Lossy(Remembered):
    """A memory that fails to take some models; {model: how often}."""

    def __init__(self, failures):
        super().__init__()
        self.failures = dict(failures)

    def remember(self, model, asked_at):
        if self.failures.get(model, 0) > 0:
            self.failures[model] -= 1
            raise OSError("the store is away")
        super().remember(model, asked_at)


async def until(holds):
    """Waits until something is so."""
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.01)


async def settled(service, model):
    """Waits until a model serves."""
    async with asyncio.timeout(60):
        while (await service.describe())[0].source.model != model:
            await asyncio.sleep(0.01)


def test_another_model_takes_over_without_a_pause(generator_folder, other_folder):
    gate, memory = threading.Event(), Remembered()
    service = service_of(generator_folder, memory, load=Loads(gate=gate))

    async def work():
        await service.reconfigure({})
        assert memory.recall() == str(generator_folder)
        async with asyncio.timeout(30):  # it does not wait for the loading, which the gate holds up for longer
            await service.reconfigure({"model": str(other_folder)})
        before = await service.generate(order())
        gate.set()
        await settled(service, str(other_folder))
        return before, await service.generate(order())

    before, after = run(work)
    assert (before.model, after.model) == ("first", "second")
    for made, folder in ((before, generator_folder), (after, other_folder)):
        expected = load_pipeline(folder).images_from_seeds([8], [7]).numpy().astype(int)
        assert np.abs(made.images.astype(int) - expected).max() <= 1
    assert memory.recall() == str(other_folder)


def test_each_model_that_serves_is_announced_and_a_failure_of_that_stops_nothing(generator_folder, other_folder):
    told = []

    def announce(source, name):
        told.append((source.model, name))
        raise OSError("the server is away")

    service = service_of(generator_folder, announce=announce)

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": str(other_folder)})
        await settled(service, str(other_folder))
        await until(lambda: len(told) == 2)
        return await service.generate(order())

    assert isinstance(run(work), GenerationResult)
    assert told == [(str(generator_folder), "first"), (str(other_folder), "second")]
    assert service.model.problem is None


def test_a_bad_model_leaves_the_old_one_serving_and_says_so(generator_folder, tmp_path):
    memory = Remembered()
    service = service_of(generator_folder, memory)

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": str(tmp_path / "none")})
        await until(lambda: service.model.problem is not None)
        made = await service.generate(order())
        problem = service.model.problem
        await service.reconfigure({})  # taken back
        return made, problem

    made, problem = run(work)
    assert made.model == "first"
    assert "none is no folder" in problem
    assert "first serves on" in problem
    assert service.model.problem is None
    assert memory.recall() == str(generator_folder)
    refused = service.recorded.values("meanflow_model_refused")
    assert 1.0 in refused
    assert refused[-1] == 0.0


def test_an_alias_in_a_user_config_is_refused(generator_folder):
    service = service_of(generator_folder, arguments={"tracking_uri": "sqlite:///nowhere.db"})

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": "models:/meanflow@champion"})
        await until(lambda: service.model.problem is not None)
        return service.model.problem

    assert "may stand for another version on each replica" in run(work)


def test_what_failed_for_a_while_is_tried_again(generator_folder, other_folder):
    loads = Loads(bad={str(other_folder)})
    service = service_of(generator_folder, load=loads, first_retry_seconds=0.05)

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": str(other_folder)})
        await until(lambda: loads.asked.count(str(other_folder)) > 1)
        loads.bad.clear()
        await settled(service, str(other_folder))

    run(work)
    assert service.model.problem is None
    assert service.recorded.values("meanflow_model_refused")[-1] == 0.0


def test_the_latest_wish_counts(generator_folder, other_folder):
    gate = threading.Event()
    service = service_of(generator_folder, load=Loads(gate=gate))

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": str(other_folder)})
        await service.reconfigure({"model": str(generator_folder)})
        gate.set()
        await asyncio.sleep(0.5)
        return (await service.describe())[0].id

    assert run(work) == "first"


def test_a_successor_whose_model_is_bad_serves_the_last_good_one(generator_folder, other_folder):
    memory = Remembered(str(other_folder))
    service = service_of(generator_folder, memory, load=Loads(bad={"broken"}))

    async def work():
        await service.reconfigure({"model": "broken"})
        return await service.describe()

    card, problem = run(work)
    assert card.id == "second"
    assert "broken is bad" in problem
    assert memory.recall() == str(other_folder)


def test_told_of_a_bad_model_before_it_had_the_good_one_a_replica_serves_what_the_others_do(
    generator_folder, other_folder
):
    gate = threading.Event()
    memory = Remembered()
    loads = Loads(bad={"broken"}, gate=gate)
    service = service_of(generator_folder, memory, load=loads)

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": str(other_folder)})
        await until(lambda: len(loads.asked) == 2)
        memory.note(str(other_folder))  # the replica beside this one has it
        await service.reconfigure({"model": "broken"})
        gate.set()
        await settled(service, str(other_folder))
        await until(lambda: service.model.problem is not None)

    run(work)
    assert "broken is bad" in service.model.problem
    assert f"{other_folder} serves on" in service.model.problem
    assert memory.recall() == str(other_folder)


def test_a_replica_whose_model_the_memory_lost_does_not_go_back_to_an_older_one(generator_folder, other_folder):
    memory = Lossy({})
    service = service_of(generator_folder, memory, load=Loads(bad={"broken"}))

    async def work():
        await service.reconfigure({})
        memory.failures[str(other_folder)] = math.inf
        await service.reconfigure({"model": str(other_folder)})
        await settled(service, str(other_folder))
        await asyncio.sleep(0.1)
        memory.failures.clear()
        await service.reconfigure({"model": "broken"})
        await until(lambda: memory.recall() == str(other_folder))
        return (await service.describe())[0].id

    assert run(work) == "second"


def test_a_replica_that_cannot_tell_the_memory_its_model_goes_by_nothing_that_is_in_it(generator_folder, other_folder):
    memory = Lossy({str(other_folder): math.inf})
    loads = Loads(bad={"broken"})
    service = service_of(generator_folder, memory, load=loads, first_retry_seconds=0.05)

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": str(other_folder)})
        await settled(service, str(other_folder))
        await service.reconfigure({"model": "broken"})
        await until(lambda: loads.asked.count("broken") > 1)
        return (await service.describe())[0].id

    assert run(work) == "second"
    assert loads.asked.count(str(generator_folder)) == 1


class Held(Lossy):
    """A memory that takes one model late, or fails late."""

    def __init__(self, model, fails=False, failures=()):
        super().__init__(failures)
        self.held, self.fails = model, fails
        self.asked, self.gate = threading.Event(), threading.Event()

    def remember(self, model, asked_at):
        if model == self.held and not self.gate.is_set():
            self.asked.set()
            assert self.gate.wait(60)
            if self.fails:
                raise OSError("the store is away")
        super().remember(model, asked_at)


def test_told_of_a_bad_model_while_its_own_is_still_being_remembered_a_replica_does_not_go_back(
    generator_folder, other_folder
):
    memory = Held(str(other_folder))
    loads = Loads(bad={"broken"})
    service = service_of(generator_folder, memory, load=loads, first_retry_seconds=0.05)

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": str(other_folder)})
        await until(memory.asked.is_set)
        await service.reconfigure({"model": "broken"})
        await until(lambda: service.model.problem is not None)
        await asyncio.sleep(0.2)
        memory.gate.set()
        await until(lambda: loads.asked.count("broken") > 1)
        return (await service.describe())[0].id

    assert run(work) == "second"
    assert loads.asked.count(str(generator_folder)) == 1
    assert memory.recall() == str(other_folder)


@pytest.mark.parametrize("fails", [False, True])
def test_what_the_memory_answers_late_of_an_older_model_does_not_hide_that_it_lacks_the_newer(
    generator_folder, other_folder, guided_folder, fails
):
    memory = Held(str(other_folder), fails, {str(guided_folder): math.inf})
    service = service_of(generator_folder, memory, load=Loads(bad={"broken"}))

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": str(other_folder)})
        await until(memory.asked.is_set)
        await service.reconfigure({"model": str(guided_folder)})
        await settled(service, str(guided_folder))
        await asyncio.sleep(0.1)
        memory.gate.set()
        await asyncio.sleep(0.1)
        memory.failures.clear()
        await service.reconfigure({"model": "broken"})
        await until(lambda: memory.recall() == str(guided_folder))
        return (await service.describe())[0].id

    assert run(work) == "guided"


def test_a_model_that_the_memory_did_not_take_is_told_again(generator_folder, other_folder):
    memory = Lossy({str(other_folder): 3})
    service = service_of(generator_folder, memory, first_retry_seconds=0.02)

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": str(other_folder)})
        await until(lambda: memory.recall() == str(other_folder))

    run(work)


def test_each_model_that_the_memory_did_not_take_is_told_again(generator_folder, other_folder, guided_folder):
    memory = Lossy({str(other_folder): 1, str(guided_folder): 1})
    service = service_of(generator_folder, memory, first_retry_seconds=0.02)

    async def work():
        await service.reconfigure({})
        for folder in (other_folder, guided_folder):
            await service.reconfigure({"model": str(folder)})
            await until(lambda model=str(folder): memory.recall() == model)
            await asyncio.sleep(0.05)

    run(work)


def test_a_bad_model_that_is_no_longer_asked_for_is_no_problem_while_the_next_one_loads(generator_folder, other_folder):
    gate = threading.Event()
    loads = Loads(bad={"broken"})
    service = service_of(generator_folder, load=loads)

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": "broken"})
        await until(lambda: service.model.problem is not None)
        loads.gate = gate
        await service.reconfigure({"model": str(other_folder)})
        await until(lambda: loads.asked[-1] == str(other_folder))
        problem, refused = service.model.problem, service.recorded.values("meanflow_model_refused")[-1]
        gate.set()
        await settled(service, str(other_folder))
        return problem, refused

    assert run(work) == (None, 0.0)


def test_a_wish_that_is_told_again_while_its_model_loads_is_as_new_as_that(generator_folder, other_folder):
    memory = Remembered(str(generator_folder))
    loads = Loads(bad={str(other_folder)})
    service = service_of(
        generator_folder, memory, load=loads, first_retry_seconds=0.05, is_asked_for=lambda user_config: False
    )

    async def work():
        await service.reconfigure({"model": str(other_folder)})  # as it starts, and not the newest by now
        await service.reconfigure({"model": str(other_folder), "max_batch_size": 2})  # which is told later
        loads.bad.clear()
        await until(lambda: memory.recall() == str(other_folder))

    run(work)


def test_while_settings_are_refused_a_replica_serves_what_the_others_do(generator_folder, other_folder):
    memory, loads = Remembered(), Loads()
    service = service_of(generator_folder, memory, load=loads, first_retry_seconds=0.05)

    async def work():
        await service.reconfigure({})
        memory.note(str(other_folder))  # those beside this one were told of it, and then of the refused settings
        await service.reconfigure({"model": str(other_folder), "max_batch_size": 0})
        await settled(service, str(other_folder))
        await service.reconfigure({"max_batch_size": -1})  # refused too, and this goes back to nothing older
        await asyncio.sleep(0.2)
        loaded, problem = list(loads.asked), service.model.problem
        memory.note(str(generator_folder))  # one of them had been told of another, whose loading took longer
        await settled(service, str(generator_folder))
        await service.reconfigure({"model": str(other_folder)})
        await settled(service, str(other_folder))
        await asyncio.sleep(0.2)
        return loaded, problem, (await service.describe())[0].id

    loaded, problem, model = run(work)
    assert loaded == [str(generator_folder), str(other_folder)]
    assert "settings refused" in problem
    assert model == "second"
    assert service.model.problem is None


def test_settings_refused_while_a_model_loads_keep_the_replica_from_nothing_that_the_others_serve(
    generator_folder, other_folder, guided_folder
):
    gate, memory = threading.Event(), Remembered()
    loads = Loads(gate=gate)
    service = service_of(generator_folder, memory, load=loads, first_retry_seconds=0.05)

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": str(other_folder)})
        await until(lambda: len(loads.asked) == 2)
        memory.note(str(guided_folder))  # those beside this one were told of it, and then of the refused settings
        await service.reconfigure({"model": str(guided_folder), "max_batch_size": 0})
        refused = service.recorded.values("meanflow_model_refused")[-1]
        gate.set()
        await settled(service, str(guided_folder))
        told = memory.recall(), service.model.problem
        await service.reconfigure({"model": str(other_folder)})
        await settled(service, str(other_folder))
        return refused, *told

    refused, last, problem = run(work)
    assert refused == 1.0
    assert last == str(guided_folder)
    assert "settings refused" in problem
    assert loads.asked == [str(folder) for folder in (generator_folder, other_folder, guided_folder, other_folder)]


def test_a_successor_whose_settings_are_refused_while_the_memory_is_away_catches_up(generator_folder, other_folder):
    class Lossy(Remembered):
        failures = 2

        def recall(self):
            if self.failures:
                self.failures -= 1
                raise OSError("the store is away")
            return super().recall()

    memory = Lossy(str(other_folder))
    service = service_of(generator_folder, memory, first_retry_seconds=0.05)

    async def work():
        await service.reconfigure({"max_batch_size": 0})
        first = (await service.describe())[0].id
        await settled(service, str(other_folder))
        return first

    assert run(work) == "first"


def test_what_is_left_of_a_model_that_failed_is_gone_before_the_others_model_is_loaded(
    generator_folder, other_folder, monkeypatch
):
    monkeypatch.setattr(serving_model.logger, "disabled", True)  # pytest keeps what is logged, with its traceback
    left, alive, memory = [], [], Remembered()

    def load(model, arguments):
        if model == "broken":
            weights = torch.zeros(1)  # on the device, say
            left.append(weakref.ref(weights))
            raise torch.OutOfMemoryError("full")
        alive.extend(ref() for ref in left)
        return load_model(model, arguments)

    service = service_of(generator_folder, memory, load=load)

    async def work():
        await service.reconfigure({})
        memory.note(str(other_folder))
        await service.reconfigure({"model": "broken"})
        await settled(service, str(other_folder))

    run(work)
    assert alive == [None]


def test_loads_that_hang_stand_in_no_ones_way(generator_folder, other_folder):
    gate = threading.Event()
    hung = [f"hung-{index}" for index in range(33)]  # more than an event loop has threads

    def load(model, arguments):
        if model in hung:
            assert gate.wait(60)
        return load_model(model, arguments)

    service = service_of(generator_folder, load=load)

    async def work():
        await service.reconfigure({})
        for model in hung:
            await service.reconfigure({"model": model})
            await asyncio.sleep(0)
        await service.reconfigure({"model": str(other_folder)})
        try:
            await settled(service, str(other_folder))
        finally:
            gate.set()

    run(work)


@pytest.mark.parametrize("name", [1, True, None])
def test_a_setting_whose_name_is_no_word_is_refused_like_any_other(generator_folder, name):
    service = service_of(generator_folder)

    async def work():
        await service.reconfigure({name: 1, "wrong": 2})
        return await service.generate(order())

    assert isinstance(run(work), GenerationResult)
    assert f"{name}" in service.model.problem


def test_a_replica_without_a_model_is_sick(generator_folder):
    service = service_of(generator_folder)
    with pytest.raises(RuntimeError, match="no model is loaded"):
        service.check_health()
    asyncio.run(service.reconfigure({}))
    service.check_health()


def test_a_replica_that_starts_late_with_an_older_wish_does_not_lead_the_others_back(generator_folder, other_folder):
    gate, memory = threading.Event(), Remembered()
    loads = Loads(bad={"broken"}, gate=gate, num_free=0)
    service = service_of(generator_folder, memory, load=loads)

    async def work():
        begun = asyncio.create_task(service.reconfigure({}))
        await until(lambda: loads.asked)
        memory.note(str(other_folder))  # a replica beside this one was told of another model meanwhile, and has it
        gate.set()
        await begun
        assert (await service.describe())[0].id == "first"
        await service.reconfigure({"model": "broken"})
        await settled(service, str(other_folder))

    run(work)
    assert memory.recall() == str(other_folder)


@pytest.mark.parametrize("answer", [False, ConnectionError("away")])
def test_what_may_no_longer_be_asked_for_when_a_replica_starts_counts_as_old(generator_folder, other_folder, answer):
    asked, memory = [], Remembered(str(other_folder))

    def is_asked_for(user_config):
        asked.append(user_config)
        if isinstance(answer, Exception):
            raise answer
        return answer

    service = service_of(generator_folder, memory, load=Loads(bad={"broken"}), is_asked_for=is_asked_for)

    async def work():
        await service.reconfigure({"max_batch_size": 2})
        first = (await service.describe())[0].id
        await service.reconfigure({"model": "broken"})
        await settled(service, str(other_folder))
        return first

    assert run(work) == "first"
    assert asked == [
        {"max_batch_size": 2}
    ]  # a replica that runs is told of every change: what it is told is the newest
    assert memory.recall() == str(other_folder)


@pytest.mark.parametrize("is_bad_at_first", [False, True])
def test_whether_a_model_is_asked_for_is_learnt_later_where_it_cannot_be_at_the_start(
    generator_folder, other_folder, is_bad_at_first
):
    answers, memory = [ConnectionError("away"), ConnectionError("away"), True], Remembered(str(other_folder))

    def is_asked_for(user_config):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    loads = Loads(bad={"broken", str(generator_folder)} if is_bad_at_first else {"broken"})
    service = service_of(generator_folder, memory, load=loads, is_asked_for=is_asked_for, first_retry_seconds=0.05)

    async def work():
        await service.reconfigure({})
        await until(lambda: not answers)
        loads.bad.discard(str(generator_folder))
        await until(lambda: memory.recall() == str(generator_folder))
        await service.reconfigure({"model": "broken"})
        await until(lambda: loads.asked.count("broken") > 1)
        return (await service.describe())[0].id

    assert run(work) == "first"


def test_what_a_replica_is_told_ends_its_asking_for_what_is_wanted(generator_folder):
    asked = []

    def is_asked_for(user_config):
        asked.append(user_config)
        raise ConnectionError("away")

    service = service_of(generator_folder, is_asked_for=is_asked_for, first_retry_seconds=0.02)

    async def work():
        await service.reconfigure({})
        await until(lambda: len(asked) > 1)
        await service.reconfigure({"max_batch_size": 2})
        before = len(asked)
        await asyncio.sleep(0.4)
        return before

    before = run(work)
    assert len(asked) <= before + 1  # one may be on its way


def test_what_a_replica_is_told_as_its_asking_fails_ends_the_asking_too(generator_folder, other_folder):
    async def last_served(num_turns):
        answered, answers = threading.Event(), [ConnectionError("away"), ConnectionError("away")]

        def is_asked_for(user_config):
            if not answers:
                return True
            error = answers.pop()
            if not answers:
                answered.set()
            raise error

        memory = Remembered()
        service = service_of(generator_folder, memory, is_asked_for=is_asked_for, first_retry_seconds=0.02)
        await service.reconfigure({})
        while not answered.is_set():
            await asyncio.sleep(0)
        time.sleep(0.02)  # the answer lies there, and the event loop has not come to it
        for _ in range(num_turns):
            await asyncio.sleep(0)
        memory.note(str(other_folder))  # the replicas beside this one were told of it
        await service.reconfigure({"max_batch_size": 0})
        await asyncio.sleep(0.1)
        return memory.recall()

    for num_turns in range(6):
        assert asyncio.run(last_served(num_turns)) == str(other_folder), num_turns


def test_an_answer_that_does_not_come_holds_up_no_start(generator_folder, monkeypatch):
    monkeypatch.setattr(serving_model, "ASKING_SECONDS", 0.05)
    gate = threading.Event()
    service = service_of(generator_folder, is_asked_for=lambda user_config: gate.wait(60))

    async def work():
        try:
            async with asyncio.timeout(20):
                await service.reconfigure({})
        finally:
            gate.set()
        return await service.generate(order())

    assert isinstance(run(work), GenerationResult)


def test_whether_refused_settings_are_wanted_is_not_asked_again(generator_folder):
    asked = []

    def is_asked_for(user_config):
        asked.append(user_config)
        raise ConnectionError("away")

    service = service_of(generator_folder, is_asked_for=is_asked_for, first_retry_seconds=0.02)

    async def work():
        await service.reconfigure({"max_batch_size": 0})
        await asyncio.sleep(0.2)

    run(work)
    assert len(asked) == 1


def test_an_answer_on_its_way_makes_a_model_no_newer_than_what_was_asked_for_meanwhile(generator_folder, other_folder):
    asked, memory = [], Remembered()

    def is_asked_for(user_config):
        asked.append(user_config)
        if len(asked) == 1:
            raise ConnectionError("away")
        memory.note(str(other_folder))  # the answer was given, and then another model was asked for
        return True

    service = service_of(generator_folder, memory, is_asked_for=is_asked_for, first_retry_seconds=0.02)

    async def work():
        await service.reconfigure({})
        await until(lambda: memory.recall() == str(other_folder))
        await asyncio.sleep(0.1)

    run(work)
    assert memory.recall() == str(other_folder)


def test_refused_settings_ask_for_no_model(generator_folder, other_folder):
    memory = Remembered()
    service = service_of(generator_folder, memory)

    async def work():
        await service.reconfigure({})
        memory.note(str(other_folder))
        await service.reconfigure({"max_batch_size": 0})

    run(work)
    assert memory.recall() == str(other_folder)


def test_a_model_that_is_taken_back_is_no_longer_the_last_good_one(generator_folder, other_folder):
    memory = Remembered()
    service = service_of(generator_folder, memory)

    async def work():
        await service.reconfigure({})
        memory.note(str(other_folder))  # a replica beside this one had it for a moment
        await service.reconfigure({})

    run(work)
    assert memory.recall() == str(generator_folder)


def test_a_model_that_others_serve_and_that_fails_here_is_not_loaded_twice_at_once(generator_folder):
    memory, loads = Remembered(), Loads(bad={"broken"})
    service = service_of(generator_folder, memory, load=loads)

    async def work():
        await service.reconfigure({})
        memory.note("broken")
        await service.reconfigure({"model": "broken"})
        await until(lambda: service.model.problem is not None)
        await asyncio.sleep(0.1)

    run(work)
    assert loads.asked == [str(generator_folder), "broken"]


def test_a_refusal_is_told_before_the_others_model_is_loaded(generator_folder, other_folder):
    gate, memory = threading.Event(), Remembered()
    loads = Loads(bad={"broken"}, gate=gate, num_free=2)
    service = service_of(generator_folder, memory, load=loads)

    async def work():
        await service.reconfigure({})
        memory.note(str(other_folder))
        await service.reconfigure({"model": "broken"})
        await until(lambda: loads.asked[-1] == str(other_folder))
        told = service.model.problem
        gate.set()
        await settled(service, str(other_folder))
        return told

    assert "broken is bad" in run(work)


def test_a_successor_goes_on_trying_for_the_model_that_is_wanted(generator_folder, other_folder):
    loads = Loads(bad={str(other_folder)})
    service = service_of(generator_folder, Remembered(str(generator_folder)), load=loads, first_retry_seconds=0.05)

    async def work():
        await service.reconfigure({"model": str(other_folder)})
        assert (await service.describe())[0].id == "first"
        loads.bad.clear()
        await settled(service, str(other_folder))

    run(work)


def test_a_successor_whose_settings_are_refused_serves_the_last_good_model(generator_folder, other_folder):
    memory = Remembered(str(other_folder))
    service = service_of(generator_folder, memory)

    async def work():
        await service.reconfigure({"model": "third", "max_batch_size": 0})
        await asyncio.sleep(0.1)
        return await service.describe()

    card, problem = run(work)
    assert card.id == "second"
    assert "settings refused" in problem
    assert memory.recall() == str(other_folder)


class Away:
    """A cluster's memory that hangs until the event loop has done other things, and then fails."""

    def __init__(self):
        self.asked, self.gate, self.held_up = threading.Event(), threading.Event(), False

    def recall(self):
        self.asked.set()
        self.held_up |= not self.gate.wait(10)
        raise ConnectionError("away")

    def remember(self, model, asked_at):
        self.recall()


def test_a_memory_that_is_away_stops_neither_the_start_nor_requests(generator_folder, other_folder):
    memory = Away()
    service = service_of(generator_folder, memory)

    async def work():
        begun = asyncio.create_task(service.reconfigure({}))
        await until(memory.asked.is_set)
        memory.gate.set()
        await begun
        memory.asked.clear()
        memory.gate.clear()
        await service.reconfigure({"model": str(other_folder)})
        await until(memory.asked.is_set)
        made = await service.generate(order())
        memory.gate.set()
        return made

    assert run(work).model == "second"
    assert not memory.held_up


def test_a_successor_with_nothing_to_remember_serves_the_arguments_model(generator_folder):
    service = service_of(generator_folder, load=Loads(bad={"broken"}))

    async def work():
        await service.reconfigure({"model": "broken"})
        return await service.describe()

    card, problem = run(work)
    assert card.id == "first"
    assert "broken is bad" in problem
    assert service.recorded.values("meanflow_model_refused")[-1] == 1.0


def test_a_model_that_fails_shows_in_the_figures_and_pauses_grow(generator_folder):
    moments = []

    def load(model, arguments):
        if model == "broken":
            moments.append(time.monotonic())
            raise ValueError("broken is bad")
        return load_model(model, arguments)

    service = service_of(generator_folder, load=load, first_retry_seconds=0.05)

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": "broken"})
        await until(lambda: len(moments) == 4)
        assert service.recorded.values("meanflow_model_refused")[-1] == 1.0
        await service.reconfigure({})

    run(work)
    assert all(pause > wanted for pause, wanted in zip(np.diff(moments), (0.05, 0.1, 0.2), strict=True))


def test_settings_taken_back_are_no_problem_any_more(generator_folder):
    service = service_of(generator_folder)

    async def work():
        for size in (2, 0, 2):
            await service.reconfigure({"max_batch_size": size})

    run(work)
    assert service.model.problem is None
    assert service.recorded.values("meanflow_model_refused")[-1] == 0.0


def test_without_any_model_the_replica_does_not_start(generator_folder):
    service = service_of(generator_folder, load=Loads(bad={str(generator_folder), "older"}), memory=Remembered("older"))
    with pytest.raises(ValueError, match=r"first is bad; cannot serve older: older is bad"):
        asyncio.run(service.reconfigure({}))


def test_other_settings_do_not_begin_a_load_anew(generator_folder, other_folder):
    gate = threading.Event()
    loads = Loads(gate=gate)
    service = service_of(generator_folder, load=loads)

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": str(other_folder)})
        await asyncio.sleep(0.05)
        await service.reconfigure({"model": str(other_folder), "max_batch_size": 2})
        gate.set()
        await settled(service, str(other_folder))
        await service.generate(order(num_images=4))

    run(work)
    assert loads.asked == [str(generator_folder), str(other_folder)]
    assert service.recorded.values("meanflow_batch_rows") == [2, 2]


def test_a_model_that_was_short_of_memory_beside_the_old_one_has_the_device_to_itself_afterwards(
    generator_folder, other_folder
):
    def load(model, arguments):
        loaded = load_model(model, arguments)
        loaded.engine.largest_that_fits = 1  # as after a warm-up without enough memory
        return loaded

    service = service_of(generator_folder, load=load)

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": str(other_folder)})
        await settled(service, str(other_folder))

    run(work)
    assert service.model.loaded.engine.largest_that_fits is None


def test_a_model_that_did_not_fit_beside_the_old_one_leaves_it_the_whole_device_again(generator_folder):
    service = None

    def load(model, arguments):
        if model == "large":
            service.model.loaded.engine.largest_that_fits = 1  # a batch of the old one did not fit beside it
            raise torch.OutOfMemoryError("full")
        return load_model(model, arguments)

    service = service_of(generator_folder, load=load)

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": "large"})
        await until(lambda: service.model.problem is not None)
        await until(lambda: service.model.loaded.engine.largest_that_fits is None)

    run(work)
