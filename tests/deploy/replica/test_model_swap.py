import asyncio
import gc
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from deploy.replica import model_swap
from deploy.replica.loading import load_model
from deploy.settings import Arguments
from meanflow_core.generator import load_pipeline
from tests.deploy.replica.test_service import request
from tests.support.endpoint import Recorded, make_service


@pytest.fixture(scope="module")
def loaded_models(generator_folder, other_folder):
    """{model: LoadedModel}, loaded once for the whole file."""
    folders = [str(generator_folder), str(other_folder)]
    return {folder: load_model(folder, Arguments(model=folder, max_batch_size=2)) for folder in folders}


class Loader:
    """Replaces load_model: returns loaded models, fails for broken ones, and blocks until a model's gate is set."""

    def __init__(self, loaded_models):
        self.loaded_models, self.broken, self.gates = loaded_models, {"broken"}, {}
        self.calls = []

    def __call__(self, model, arguments):
        self.calls.append((model, time.monotonic()))
        if model in self.gates:
            assert self.gates[model].wait(60)
        if model in self.broken:
            raise ValueError(f"{model} is broken")
        return self.loaded_models[model]

    @property
    def models(self):
        return [model for model, _ in self.calls]


@pytest.fixture
def loader(loaded_models):
    return Loader(loaded_models)


@pytest.fixture
def service(generator_folder, loader):
    return service_of(generator_folder, loader)


def service_of(folder, load, **options):
    recorded = Recorded()
    arguments = Arguments(model=str(folder), max_batch_size=2)
    service = make_service(
        arguments, recorded, load=load, **{"tag_as_serving": lambda *_: None, "first_retry_seconds": 0.05, **options}
    )
    service.recorded = recorded
    return service


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def serves(service, name):
    return lambda: service.models.current.info.id == name


def test_the_old_model_serves_until_the_next_one_is_loaded(service, loader, generator_folder, other_folder):
    gate = loader.gates[str(other_folder)] = threading.Event()

    async def work():
        await service.reconfigure({})
        async with asyncio.timeout(30):  # returns although the gate blocks the load
            await service.reconfigure({"model": str(other_folder)})
        await until(lambda: len(loader.calls) == 2)
        before = await service.generate(request())
        gate.set()
        await until(serves(service, "second"))
        return before, await service.generate(request())

    before, after = asyncio.run(work())
    for result, folder, name in ((before, generator_folder, "first"), (after, other_folder, "second")):
        expected = load_pipeline(folder).images_from_seeds([8], [7]).numpy().astype(int)
        assert np.abs(result.images.astype(int) - expected).max() <= 1
        assert result.model == name
    assert service.models.problem is None


def test_a_broken_model_changes_nothing_and_is_retried_with_increasing_delays(service, loader):
    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": "broken"})
        await until(lambda: loader.models.count("broken") == 4)
        status, result = await service.describe(), await service.generate(request())
        refused = service.recorded.values("meanflow_model_refused")[-1]
        await service.reconfigure({})  # withdraws the request
        return status, result, refused

    status, result, refused = asyncio.run(work())
    assert status.model.id == result.model == "first"
    assert "cannot load broken: broken is broken; serving " in status.problem
    assert status.problem.endswith("first instead")
    assert refused == 1.0
    times = [seconds for model, seconds in loader.calls if model == "broken"]
    assert all(delay > minimum for delay, minimum in zip(np.diff(times), (0.05, 0.1, 0.2), strict=True))
    assert service.models.problem is None
    assert service.recorded.values("meanflow_model_refused")[-1] == 0.0


def test_the_latest_request_wins_even_over_loads_that_hang(service, loader, generator_folder, other_folder):
    hanging = [f"hanging-{index}" for index in range(33)]  # asyncio's default executor has at most 32 threads
    gate = threading.Event()
    loader.gates = dict.fromkeys([*hanging, str(other_folder)], gate)

    async def work():
        await service.reconfigure({})
        for model in [*hanging, str(other_folder)]:
            await service.reconfigure({"model": model})
            await until(lambda model=model: model in loader.models)
        await service.reconfigure({})  # back to the serving model
        gate.set()
        await asyncio.sleep(0.2)
        return await service.describe()

    status = asyncio.run(work())
    assert (status.model.id, status.problem) == ("first", None)


def test_a_new_request_clears_the_problem_of_the_previous_one(service, loader, other_folder):
    gate = loader.gates[str(other_folder)] = threading.Event()

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": "broken"})
        await until(lambda: service.models.problem is not None)
        await service.reconfigure({"model": str(other_folder)})
        problem = service.models.problem
        gate.set()
        await until(serves(service, "second"))
        return problem

    assert asyncio.run(work()) is None


def test_other_settings_do_not_restart_a_load(service, loader, generator_folder, other_folder):
    gate = loader.gates[str(other_folder)] = threading.Event()

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": str(other_folder)})
        await until(lambda: len(loader.calls) == 2)
        await service.reconfigure({"model": str(other_folder), "max_batch_size": 1})
        gate.set()
        await until(serves(service, "second"))
        await service.generate(request(num_images=2))

    asyncio.run(work())
    assert loader.models == [str(generator_folder), str(other_folder)]
    assert service.recorded.values("meanflow_batch_rows") == [1, 1]


def test_a_new_replica_serves_the_deployed_model_if_the_requested_one_fails(service, loader, other_folder):
    loader.broken = {str(other_folder)}

    async def work():
        await service.reconfigure({"model": str(other_folder)})
        status = await service.describe()
        refused = service.recorded.values("meanflow_model_refused")[-1]
        loader.broken.clear()
        await until(serves(service, "second"))
        return status, refused

    status, refused = asyncio.run(work())
    assert status.model.id == "first"
    assert "second is broken; serving " in status.problem
    assert refused == 1.0
    assert service.models.problem is None
    assert service.recorded.values("meanflow_model_refused")[-1] == 0.0


def test_a_new_replica_with_refused_settings_serves_the_deployed_model(service, other_folder):
    async def work():
        await service.reconfigure({"model": str(other_folder), "max_batch_size": 0})
        return await service.describe()

    status = asyncio.run(work())
    assert status.model.id == "first"
    assert "settings of the generator refused" in status.problem
    assert service.recorded.values("meanflow_settings_refused") == [1.0]


def test_a_replica_without_any_model_does_not_start(service, loader, generator_folder):
    loader.broken.add(str(generator_folder))
    with pytest.raises(RuntimeError, match="no model is loaded"):
        service.check_health()
    with pytest.raises(ValueError, match=r"cannot load broken: .*; cannot load .*first: "):
        asyncio.run(service.reconfigure({"model": "broken"}))


def test_an_alias_in_a_user_config_is_refused(generator_folder):
    service = service_of(generator_folder, load_model)

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": "models:/meanflow@champion"})
        await until(lambda: service.models.problem is not None)

    asyncio.run(work())
    assert "may refer to a different version on each replica" in service.models.problem


def test_every_serving_model_is_tagged_and_failed_tagging_is_harmless(generator_folder, other_folder, loader):
    tagged = []

    def tag_as_serving(source, name):
        tagged.append((source.model, name))
        raise OSError("the server is down")

    service = service_of(generator_folder, loader, tag_as_serving=tag_as_serving)

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": str(other_folder)})
        await until(lambda: len(tagged) == 2)
        return await service.describe()

    assert asyncio.run(work()).problem is None
    assert tagged == [(str(generator_folder), "first"), (str(other_folder), "second")]


def test_a_failed_load_keeps_no_device_memory(generator_folder, loaded_models, monkeypatch):
    monkeypatch.setattr(model_swap.logger, "disabled", True)  # pytest keeps log records with their tracebacks
    weights, was_freed = [], []

    def load(model, arguments):
        if model == str(generator_folder):
            return loaded_models[model]
        was_freed.extend(weight() is None for weight in weights)
        tensor = torch.zeros(1)  # represents the weights on the device
        weights.append(weakref.ref(tensor))
        service.models.current.engine.max_size_that_fits = 1  # as if a batch had run out of memory during the load
        raise torch.OutOfMemoryError("full")

    service = service_of(generator_folder, load)

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": "too large"})
        await until(lambda: len(weights) == 2)
        await until(lambda: service.models.current.engine.max_size_that_fits is None)

    gc.collect()
    gc.disable()  # the tensor must be freed without a garbage collection
    try:
        asyncio.run(work())
    finally:
        gc.enable()
    assert was_freed
    assert all(was_freed)


def test_a_swapped_in_model_uses_the_whole_device(service, other_folder, loaded_models):
    engine = loaded_models[str(other_folder)].engine
    engine.max_size_that_fits = 1  # as after a warm-up while two models shared the device

    async def work():
        await service.reconfigure({})
        await service.reconfigure({"model": str(other_folder)})
        await until(serves(service, "second"))

    asyncio.run(work())
    assert engine.max_size_that_fits is None
