import asyncio
import gc
import threading
import weakref

import numpy as np
import pytest
import torch

from deploy.messages import GenerationRequest, GenerationResult, Refusal
from deploy.replica.loading import load_model
from deploy.replica.service import GeneratorService
from deploy.replica.serving_model import ServingModel
from deploy.settings import Arguments
from meanflow_core.generator import load_pipeline
from meanflow_core.pipeline import noise_between, noise_from_seeds
from tests.support.endpoint import Recorded, Remembered


def order(**changes):
    wanted = {
        "class_": "star", "num_images": 1, "seed": 7, "seed_end": None, "timesteps": (1.0, 0.0), "guidance_scale": None,
        "guidance_interval": None, "is_preview": False, "model": None, "size": "auto", "timeout_seconds": 30.0,
    }  # fmt: skip
    return GenerationRequest(**{**wanted, **changes})


def service_of(folder, memory=None, **options):
    recorded = Recorded()
    arguments = Arguments(model=str(folder), **{"max_batch_size": 4, **options.pop("arguments", {})})
    model = ServingModel(arguments, memory or Remembered(), recorded, **options)
    service = GeneratorService(model, recorded)
    service.model, service.recorded = model, recorded
    return service


def run(work):
    return asyncio.run(work())


def test_orders_that_arrive_together_share_a_batch_and_get_their_own_images(generator_folder):
    service = service_of(generator_folder, arguments={"batch_wait_seconds": 0.05})

    async def work():
        await service.reconfigure({})
        return await asyncio.gather(
            service.generate(order(seed=7)), service.generate(order(class_=2, seed=3, num_images=2)),
            service.generate(order(seed=7, timesteps=(1.0, 0.5, 0.0))),
        )  # fmt: skip

    one, two, other_steps = run(work)
    assert all(isinstance(made, GenerationResult) for made in (one, two, other_steps))
    pipeline = load_pipeline(generator_folder)
    expected = pipeline.images_from_seeds([8, 2, 2], [7, 3, 4])
    got = np.concatenate([one.images, two.images])
    assert np.abs(got.astype(int) - expected.numpy().astype(int)).max() <= 1
    twice = pipeline.images_from_seeds([8], [7], 2).numpy().astype(int)
    assert np.abs(other_steps.images.astype(int) - twice).max() <= 1
    assert (one.class_name, one.wnid, two.class_id) == ("star", "d0000008", 2)
    assert service.recorded.values("meanflow_batch_rows") == [3, 1]
    assert sum(service.recorded.values("meanflow_images_total")) == 4
    assert min(one.queue_seconds, one.model_seconds, one.decode_seconds) > 0


def test_images_between_two_seeds_begin_and_end_with_theirs(generator_folder):
    service = service_of(generator_folder)

    async def work():
        await service.reconfigure({})
        between = await service.generate(order(seed=1, seed_end=2, num_images=3))
        ends = [await service.generate(order(seed=seed)) for seed in (1, 2)]
        return between, ends

    between, ends = run(work)
    assert between.weights == [0.0, 0.5, 1.0]
    for image, end in ((between.images[0], ends[0]), (between.images[2], ends[1])):
        assert np.abs(image.astype(int) - end.images[0].astype(int)).max() <= 1
    start, end = noise_from_seeds([1], (4, 8, 8)), noise_from_seeds([2], (4, 8, 8))
    pipeline = load_pipeline(generator_folder)
    middle = pipeline(class_labels=[8], latents=noise_between(start, end, [0.5]), output_type="np").images[0]
    assert np.abs(between.images[1].astype(int) - np.round(255 * middle)).max() <= 1


@pytest.mark.parametrize(
    ("changes", "status", "param", "words"),
    [
        ({"class_": "unicorn"}, 400, "class", "unknown class"),
        ({"size": "256x256"}, 400, "size", "images of 64x64 alone, but got '256x256'"),
        ({"guidance_scale": 2.0}, 400, "guidance_scale", "built into its weights"),
        ({"guidance_interval": (0.1, 0.2)}, 400, "guidance_interval", "built into its weights"),
        ({"is_preview": True}, 400, "preview", "no preview decoder"),
        ({"model": "other"}, 404, "model", "'other'; 'first' serves here"),
    ],
)
def test_what_this_model_cannot_do_is_refused(generator_folder, changes, status, param, words):
    service = service_of(generator_folder)

    async def work():
        await service.reconfigure({})
        return await service.generate(order(**changes))

    refusal = run(work)
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.param) == (status, param)
    assert words in refusal.message


def test_a_scale_of_one_is_no_guidance_and_taken_by_every_model(generator_folder):
    service = service_of(generator_folder)

    async def work():
        await service.reconfigure({})
        return await service.generate(order(guidance_scale=1.0))

    assert isinstance(run(work), GenerationResult)


def test_what_fits_this_model_is_taken(guided_folder):
    service = service_of(guided_folder)

    async def work():
        await service.reconfigure({})
        fitting = order(
            model="guided", size="64x64", guidance_scale=3.0, guidance_interval=(0.2, 0.9), class_="d0000008"
        )
        return await service.generate(fitting)

    assert isinstance(run(work), GenerationResult)


def test_the_event_loop_goes_on_while_models_load_and_compute(generator_folder, monkeypatch):
    threads = []
    service = service_of(
        generator_folder, load=lambda *asked: threads.append(threading.current_thread()) or load_model(*asked)
    )

    async def work():
        await service.reconfigure({})
        engine = service.model.loaded.engine
        run_engine = engine.run
        monkeypatch.setattr(
            engine, "run", lambda *rows: threads.append(threading.current_thread()) or run_engine(*rows)
        )
        await service.generate(order())

    run(work)
    assert len(set(threads)) == 2  # one loads, so that the old model serves meanwhile
    assert threading.current_thread() not in threads


def test_settings_change_in_place_and_bad_ones_change_nothing(generator_folder):
    service = service_of(generator_folder)

    async def work():
        await service.reconfigure({"max_batch_size": 2})
        await service.generate(order(num_images=4))
        await service.reconfigure({"max_batch_size": 0})
        problem = service.model.problem
        await service.generate(order(num_images=4))
        await service.reconfigure({"precision": "bfloat16"})
        return problem, service.model.problem

    first, second = run(work)
    assert service.recorded.values("meanflow_batch_rows") == [2, 2, 2, 2]
    assert "max_batch_size" in first
    assert "but got precision too; other settings belong under args" in second


def test_a_full_queue_and_a_deadline_are_told(generator_folder):
    service = service_of(generator_folder, arguments={"max_queued_images": 4, "max_batch_size": 1})

    async def work():
        await service.reconfigure({})
        many = [asyncio.create_task(service.generate(order(num_images=2))) for _ in range(6)]
        answers = await asyncio.gather(*many)
        late = await service.generate(order(num_images=16, timeout_seconds=0.02))
        return answers, late

    answers, late = run(work)
    refused = [answer for answer in answers if isinstance(answer, Refusal)]
    assert 1 <= len(refused) < 6
    assert {(refusal.status, refusal.code) for refusal in refused} == {(429, "overloaded")}
    assert all(refusal.retry_after_seconds > 0 for refusal in refused)
    assert (late.status, late.code) in {(504, "deadline_exceeded"), (429, "overloaded")}
    assert len(service.recorded.values("meanflow_refused_total")) == len(refused) + 1


def test_a_device_that_is_full_is_told(generator_folder, monkeypatch):
    service = service_of(generator_folder)

    async def work():
        await service.reconfigure({})

        def full(group, rows):
            raise torch.OutOfMemoryError("full")

        monkeypatch.setattr(service.model.loaded.engine, "run", full)
        return await service.generate(order())

    refusal = run(work)
    assert (refusal.status, refusal.code) == (503, "out_of_memory")


def test_what_a_failed_batch_held_is_gone_when_its_callers_are_told(generator_folder, monkeypatch):
    service = service_of(generator_folder, arguments={"batch_wait_seconds": 0.05})
    monkeypatch.setattr(service.logger, "disabled", True)  # pytest keeps what is logged, with its traceback
    held = []

    def full(group, rows):
        activations = torch.zeros(1)  # on the device, say
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("full")

    async def work():
        await service.reconfigure({})
        monkeypatch.setattr(service.model.loaded.engine, "run", full)
        gc.collect()
        gc.disable()  # a collection comes when it comes, and meanwhile the next batch would not fit either
        try:
            refusals = await asyncio.gather(service.generate(order()), service.generate(order(num_images=2)))
            async with asyncio.timeout(5):
                while held[0]() is not None:  # the thread that computed may hold its error for a moment more
                    await asyncio.sleep(0.01)
            return refusals
        finally:
            gc.enable()

    assert [refusal.code for refusal in run(work)] == ["out_of_memory"] * 2
    assert len(held) == 1


def test_batches_that_did_not_fit_are_counted(generator_folder, monkeypatch):
    service = service_of(generator_folder)

    async def work():
        await service.reconfigure({})
        vae = service.model.loaded.engine.pipeline.vae
        decode = vae.decode

        def limited(z):
            if len(z) > 2:
                raise torch.OutOfMemoryError("full")
            return decode(z)

        monkeypatch.setattr(vae, "decode", limited)
        return await service.generate(order(num_images=4))

    assert isinstance(run(work), GenerationResult)
    assert sum(service.recorded.values("meanflow_out_of_memory_total")) == 1


def test_batches_that_were_halved_down_to_one_that_did_not_fit_are_counted_too(generator_folder, monkeypatch):
    service = service_of(generator_folder)

    async def work():
        await service.reconfigure({})

        def full(z):
            raise torch.OutOfMemoryError("full")

        monkeypatch.setattr(service.model.loaded.engine.pipeline.vae, "decode", full)
        return await service.generate(order(num_images=4))

    assert run(work).code == "out_of_memory"
    assert sum(service.recorded.values("meanflow_out_of_memory_total")) == 2  # of 4 and of 2


def test_a_replica_whose_batches_all_fail_is_sick(generator_folder, monkeypatch):
    service = service_of(generator_folder)

    async def work():
        await service.reconfigure({})
        engine_run = service.model.loaded.engine.run

        def fault(group, rows):
            raise RuntimeError("an illegal memory access was encountered")

        for broken in (2, 3):
            monkeypatch.setattr(service.model.loaded.engine, "run", fault)
            for _ in range(broken):
                service.check_health()
                with pytest.raises(RuntimeError, match="illegal"):
                    await service.generate(order())
            if broken == 2:
                monkeypatch.setattr(service.model.loaded.engine, "run", engine_run)
                await service.generate(order())  # and all is well again
                service.check_health()

    run(work)
    with pytest.raises(RuntimeError, match="the last 3 batches failed"):
        service.check_health()
