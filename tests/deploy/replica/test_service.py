import asyncio
import gc
import threading
import weakref

import numpy as np
import pytest
import torch

from deploy.messages import GenerationRequest, GenerationResult, Refusal
from deploy.replica import service as service_module
from deploy.replica.loading import load_model
from deploy.settings import Arguments
from meanflow_core.generator import load_pipeline
from meanflow_core.sampling import noise_between, noise_from_seeds
from tests.support.endpoint import Recorded, make_service


def request(**changes):
    defaults = {
        "class_": "star", "num_images": 1, "seed": 7, "seed_end": None, "timesteps": (1.0, 0.0), "guidance_scale": None,
        "guidance_interval": None, "is_preview": False, "model": None, "size": "auto", "timeout_seconds": 30.0,
    }  # fmt: skip
    return GenerationRequest(**{**defaults, **changes})


def service_of(folder, load=load_model, **arguments):
    recorded = Recorded()
    service = make_service(Arguments(model=str(folder), **{"max_batch_size": 4, **arguments}), recorded, load=load)
    service.recorded = recorded
    return service


def run(service, work):
    """Runs `work()` after the first model is loaded."""

    async def configured():
        await service.reconfigure({})
        return await work()

    return asyncio.run(configured())


def limit_memory(monkeypatch, service, max_images):
    """Makes decoding run out of memory above a number of images."""
    vae = service.models.current.engine.pipeline.vae
    decode = vae.decode

    def limited(z):
        if len(z) > max_images:
            raise torch.OutOfMemoryError("full")
        return decode(z)

    monkeypatch.setattr(vae, "decode", limited)


def test_concurrent_requests_share_a_batch_and_get_their_own_images(generator_folder):
    service = service_of(generator_folder, batch_wait_seconds=0.05)

    async def work():
        return await asyncio.gather(
            service.generate(request(seed=7)),
            service.generate(
                request(class_=2, seed=3, num_images=2, guidance_scale=1.0)
            ),  # a scale of 1 means no guidance
            service.generate(request(seed=7, timesteps=(1.0, 0.5, 0.0))),
        )

    one, two, other_steps = run(service, work)
    pipeline = load_pipeline(generator_folder)
    expected = pipeline.images_from_seeds([8, 2, 2], [7, 3, 4])
    images = np.concatenate([one.images, two.images])
    assert np.abs(images.astype(int) - expected.numpy().astype(int)).max() <= 1
    two_steps = pipeline.images_from_seeds([8], [7], 2).numpy().astype(int)
    assert np.abs(other_steps.images.astype(int) - two_steps).max() <= 1
    assert (one.class_name, one.wnid, two.class_id) == ("star", "d0000008", 2)
    assert service.recorded.values("meanflow_batch_rows") == [3, 1]
    assert sum(service.recorded.values("meanflow_images_total")) == 4
    assert min(one.queue_seconds, one.model_seconds, one.decode_seconds) > 0


def test_a_stream_yields_each_batch_at_once_and_leaves_the_queue_when_it_is_closed(generator_folder):
    service = service_of(generator_folder)

    async def work():
        whole = await service.generate(request(seed=7, num_images=10))
        parts = [part async for part in service.stream(request(seed=7, num_images=10))]
        closed = service.stream(request(seed=7, num_images=40))
        await anext(closed)
        num_waiting = service._batcher.num_queued
        await closed.aclose()
        await asyncio.sleep(0)
        return whole, parts, num_waiting, service._batcher.num_queued

    whole, parts, num_waiting, num_left = run(service, work)
    assert [part.indices for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert np.array_equal(np.concatenate([part.result.images for part in parts]), whole.images)
    seconds = [part.result.model_seconds for part in parts]
    assert 0.0 < seconds[0] < seconds[1] < seconds[2]
    assert num_waiting >= 32
    assert num_left == 0


def test_partial_images_tell_the_times_of_the_batches_before_them(generator_folder):
    service = service_of(generator_folder)
    asked = request(num_images=8, timesteps=(1.0, 0.5, 0.0), num_partial=1)

    async def work():
        return [part async for part in service.stream(asked)]

    parts = run(service, work)
    assert [part.indices for part in parts] == [[0], [1], [2], [3], [0, 1, 2, 3], [4], [5], [6], [7], [4, 5, 6, 7]]
    assert [part.partial_index for part in parts] == [0, 0, 0, 0, None, 0, 0, 0, 0, None]
    seconds = [part.result.model_seconds for part in parts]
    assert seconds[:4] == [0.0] * 4
    assert seconds[5:9] == [seconds[4]] * 4
    assert 0.0 < seconds[4] < seconds[9]


def test_images_between_two_seeds_interpolate_their_noise(generator_folder):
    service = service_of(generator_folder)
    between = run(service, lambda: service.generate(request(seed=1, seed_end=2, num_images=3)))
    assert between.weights == [0.0, 0.5, 1.0]
    noise = noise_between(noise_from_seeds([1], (4, 8, 8)), noise_from_seeds([2], (4, 8, 8)), [0.5])
    middle = load_pipeline(generator_folder)(class_labels=[8], latents=noise, output_type="np").images[0]
    assert np.abs(between.images[1].astype(int) - np.round(255 * middle)).max() <= 1


def test_supported_options_are_accepted(guided_folder):
    service = service_of(guided_folder)
    options = {"model": "guided", "size": "64x64", "guidance_scale": 3.0, "guidance_interval": (0.2, 0.9)}
    result = run(service, lambda: service.generate(request(**options, class_="d0000008")))
    assert isinstance(result, GenerationResult)


def test_loading_and_computing_leave_the_event_loop_free(generator_folder, monkeypatch):
    threads = []
    service = service_of(
        generator_folder, load=lambda *args: threads.append(threading.current_thread()) or load_model(*args)
    )

    async def work():
        engine = service.models.current.engine
        run_engine = engine.run
        monkeypatch.setattr(
            engine, "run", lambda *args: threads.append(threading.current_thread()) or run_engine(*args)
        )
        await service.generate(request())

    run(service, work)
    assert len(set(threads)) == 2  # loading has its own thread, so that the current model keeps serving
    assert threading.current_thread() not in threads


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"precision": "bfloat16"}, "but got precision; other settings belong under args"),
        ({1: 1, None: 2}, "but got 1, None;"),
    ],
)
def test_settings_change_in_place_and_refused_ones_change_nothing(generator_folder, refused, words):
    service = service_of(generator_folder)

    async def work():
        await service.reconfigure({"max_batch_size": 2})
        await service.reconfigure({**refused, "model": "other"})
        await service.generate(request(num_images=4))
        status = await service.describe()
        await service.reconfigure({"max_batch_size": 2})
        return status

    status = run(service, work)
    assert service.recorded.values("meanflow_batch_rows") == [2, 2]
    assert words in status.problem
    assert status.model.id == "first"
    assert service.settings_problem is None
    assert service.recorded.values("meanflow_settings_refused") == [0.0, 0.0, 1.0, 0.0]
    parts = [tags for name, _, tags in service.recorded.entries if name == "meanflow_settings_refused"]
    assert parts == [{"part": "generator"}] * len(parts)


def test_a_full_queue_and_a_missed_deadline_are_refused(generator_folder):
    service = service_of(generator_folder, max_queued_images=4, max_batch_size=1)

    async def work():
        requests = [service.generate(request(num_images=2)) for _ in range(6)]
        results = await asyncio.gather(*requests)
        return results, await service.generate(request(num_images=16, timeout_seconds=0.02))

    results, late = run(service, work)
    refused = [result for result in results if isinstance(result, Refusal)]
    assert 1 <= len(refused) < 6
    assert {(refusal.status, refusal.code) for refusal in refused} == {(429, "overloaded")}
    assert all(refusal.retry_after_seconds > 0 for refusal in refused)
    assert (late.status, late.code) in {(504, "deadline_exceeded"), (429, "overloaded")}
    assert len(service.recorded.values("meanflow_refused_total")) == len(refused) + 1


def test_a_failed_batch_keeps_no_memory_once_its_requests_are_answered(generator_folder, monkeypatch):
    service = service_of(generator_folder, batch_wait_seconds=0.05)
    monkeypatch.setattr(service_module.logger, "disabled", True)  # pytest keeps log records with their tracebacks
    activations = []

    def out_of_memory(options, specs):
        tensor = torch.zeros(1)  # represents activations on the device
        activations.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("full")

    async def work():
        monkeypatch.setattr(service.models.current.engine, "run", out_of_memory)
        gc.collect()
        gc.disable()  # the next batch needs the memory, before any garbage collection
        try:
            refusals = await asyncio.gather(service.generate(request()), service.generate(request(num_images=2)))
            async with asyncio.timeout(5):
                while activations[0]() is not None:  # the compute thread may hold its error for a moment
                    await asyncio.sleep(0.01)
            return refusals
        finally:
            gc.enable()

    refusals = run(service, work)
    assert [(refusal.status, refusal.code) for refusal in refusals] == [(503, "out_of_memory")] * 2
    assert len(activations) == 1


@pytest.mark.parametrize(("max_images", "num_halved"), [(2, 1), (0, 2)])
def test_batches_that_ran_out_of_memory_are_counted(generator_folder, monkeypatch, max_images, num_halved):
    service = service_of(generator_folder)

    async def work():
        limit_memory(monkeypatch, service, max_images)
        return await service.generate(request(num_images=4))

    assert isinstance(run(service, work), GenerationResult) == (max_images > 0)
    assert sum(service.recorded.values("meanflow_out_of_memory_total")) == num_halved


def test_a_replica_is_unhealthy_after_three_failed_batches_in_a_row(generator_folder, monkeypatch):
    service = service_of(generator_folder)

    def fault(options, specs):
        raise RuntimeError("an illegal memory access was encountered")

    async def work():
        engine = service.models.current.engine
        run_engine = engine.run
        for num_failures in (2, 3):
            monkeypatch.setattr(engine, "run", fault)
            for _ in range(num_failures):
                service.check_health()
                with pytest.raises(RuntimeError, match="illegal"):
                    await service.generate(request())
            if num_failures == 2:
                monkeypatch.setattr(engine, "run", run_engine)
                await service.generate(request())  # a success resets the count
                service.check_health()

    run(service, work)
    with pytest.raises(RuntimeError, match="the last 3 batches failed"):
        service.check_health()
