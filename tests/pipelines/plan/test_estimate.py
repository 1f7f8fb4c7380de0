"""Estimates compared with hand calculations, the runbook's figures, and bytes counted on this machine."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import distributed

from meanflow_core.checkpoint import save_train_state
from meanflow_core.config import GuidanceConfig, TrainingConfig
from meanflow_core.presets import debug, xl2
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.encode.job import EncodeJob
from pipelines.errors import InputError
from pipelines.latents.shards import shard_bytes
from pipelines.plan.__main__ import parse_arguments
from pipelines.plan.cost import executed_flops, memory_estimate, num_parameters, step_flops
from pipelines.plan.estimate import (
    Workload,
    compute_seconds,
    estimate,
    largest_micro_batch,
    payload_bytes,
    ring_seconds,
    train_on,
)
from pipelines.plan.hardware import GPUS, Cluster
from pipelines.plan.job import PlanJob
from pipelines.plan.report import describe_estimate
from pipelines.plan.run import build_cluster, build_workload, plan
from tests.support.latents import encode_without_ray
from tests.support.processes import run_processes
from tests.support.sent_bytes import GUIDED, count_sent
from tests.support.training_steps import fresh_state, take_steps

RUNBOOK = Path(__file__).parents[3] / "docs/runbook.md"
A100 = GPUS["a100"]


def cluster(**changes) -> Cluster:
    defaults = {
        "gpu": A100,
        "gpus_per_node": 8,
        "teraflops": 50.0,
        "link_gbyte": 200.0,
        "network_gbit": 100.0,
        "storage_gbyte": 1.0,
        "price_per_gpu_hour": None,
    }
    return Cluster(**{**defaults, **changes})


def workload(config: TrainingConfig | None = None, **changes) -> Workload:
    defaults = {
        "config": config or debug(),
        "num_images": 40,
        "latent_shape": (4, 8, 8),
        "num_classes": 10,
        "mirrored": True,
        "parallelism": "ddp",
        "samples_per_pass": None,
    }
    return Workload(**{**defaults, **changes})


def imagenet(config: TrainingConfig, **changes) -> Workload:
    return workload(config, num_images=1_281_167, latent_shape=(4, 32, 32), num_classes=1000, **changes)


def small_gpu(memory: int) -> Cluster:
    """A cluster whose GPUs have this many usable bytes."""
    return cluster(gpu=replace(A100, memory_bytes=(memory + 2e9) / 0.95))


def runbook_number(pattern: str) -> str:
    """The digits in place of NUMBER in a phrase that must occur exactly once in the runbook."""
    [digits] = re.findall(re.escape(pattern).replace("NUMBER", r"([\d.,]*\d)"), RUNBOOK.read_text())
    return digits.replace(",", "")


def test_runbook_figures_match_the_estimate():
    sustained = float(runbook_number("A GPU **sustains NUMBER TFLOP/s**"))
    price = float(runbook_number("A node of 8 GPUs costs **NUMBER dollars an hour**")) / 8
    machines = cluster(teraflops=sustained, price_per_gpu_hour=price)
    many = estimate(
        imagenet(replace(xl2(), precision="tf32", checkpoint_interval_steps=2500)), machines, 32, others=(8,)
    )
    [one_node] = [training for training in many.trainings if training.num_gpus == 8]
    expected = {
        "NUMBER TFLOP a step": many.flops / 1e12,
        "One node of 8: NUMBER s a step": one_node.compute_seconds,
        "At the assumed pace a step takes NUMBER s on 32 GPUs": many.requested.compute_seconds,
        "gradients once: NUMBER GB in float32": many.workload.gradient_bytes / 1e9,
        "GPU: NUMBER GB a step at 32": many.requested.gpu_bytes / 1e9,
        "four nodes over 100 Gbit/s of TCP would take NUMBER s a step": many.requested.communication_seconds,
        "parameters; NUMBER GB a GPU with 8 rows at once": many.memory.total / 1e9,
        "a checkpoint of NUMBER GB": many.checkpoint_bytes / 1e9,
        "every 2,500 steps: NUMBER minutes on 32 GPUs": 2500 * many.requested.compute_seconds / 60,
        "both mirrors | 0.5 h | 0.1 h | | 11 | NUMBER GB in 2,503 shards": many.workload.latent_bytes / 1e9,
        "NUMBER h: 9.0 days": one_node.seconds[0] / 3600,
    }
    for pattern, value in expected.items():
        number = runbook_number(pattern)
        num_decimals = len(number.partition(".")[2])
        assert float(number) == pytest.approx(value, abs=0.5000001 * 10**-num_decimals), pattern
    # These two are rounded to tens.
    assert float(runbook_number("so hiding it requires **NUMBER Gbit/s a node**")) == round(many.hiding_gbit, -1)
    assert float(runbook_number("9.0 days | 54.1 h: 2.3 days | 27.0 h | NUMBER; spot")) == round(one_node.cost[0], -1)


def test_slowest_link_limits_the_ring():
    assert ring_seconds(80e9, cluster(), 32) == pytest.approx(80e9 / 12.5e9)  # the network
    assert ring_seconds(80e9, cluster(), 4) == pytest.approx(80e9 / 200e9)  # one node: its links
    assert ring_seconds(80e9, cluster(network_gbit=6400.0), 32) == pytest.approx(80e9 / 200e9)
    assert train_on(workload(), cluster(), 4, 16).gpu_bytes == 2 * workload().gradient_bytes * 3 / 4
    assert train_on(workload(), cluster(), 1, 16).communication_seconds == 0.0


def test_step_takes_between_the_longer_of_compute_and_communication_and_their_sum():
    load, machines = imagenet(xl2()), cluster(price_per_gpu_hour=3.0)
    found = train_on(load, machines, 16, 16)
    compute, sent = found.compute_seconds, found.communication_seconds
    assert compute == pytest.approx(step_flops(xl2(), **load.sizes) / 16 / 50e12)
    assert found.step_seconds == (max(compute, sent), compute + sent)
    assert found.images_per_second == pytest.approx((256 / (compute + sent), 256 / max(compute, sent)))
    assert found.seconds[1] == pytest.approx((compute + sent) * 1_200_960)
    assert found.gpu_hours[1] == pytest.approx(16 * (compute + sent) * 1_200_960 / 3600)
    assert found.cost == pytest.approx(tuple(3 * hours for hours in found.gpu_hours))
    assert found.efficiency[0] == pytest.approx(compute / (compute + sent))
    alone = train_on(load, machines, 1, 16)
    assert alone.step_seconds[0] == alone.step_seconds[1] == pytest.approx(16 * compute)
    assert alone.efficiency == (1.0, 1.0)


def test_step_takes_as_long_as_the_gpu_with_the_most_samples():
    load = workload(replace(debug(), global_batch_size=16))
    of_three, of_two = (compute_seconds(load, cluster(), number) for number in (3, 2))
    assert of_three / of_two == pytest.approx(6 / 8)


def test_assumed_rates_match_published_ones():
    h800 = cluster(gpu=GPUS["h100"], teraflops=None)
    assert h800.sustained_teraflops("bfloat16") == pytest.approx(119.0)
    # In tf32, the runbook assumes 50 TFLOP/s for an A100 and 100 TFLOP/s for an H100.
    a100 = cluster(gpu=GPUS["a100"], teraflops=None)
    assert a100.sustained_teraflops("tf32") == pytest.approx(50.0, rel=0.1)
    assert h800.sustained_teraflops("tf32") == pytest.approx(100.0, rel=0.1)
    precisions = ("float32", "tf32", "bfloat16")
    for gpu in GPUS.values():
        rates = [cluster(gpu=gpu, teraflops=None).sustained_teraflops(name) for name in precisions]
        assert rates == sorted(rates)
        assert all(rate < gpu.peak_teraflops[name] for rate, name in zip(rates, precisions, strict=True))


def test_derivative_under_bfloat16_runs_at_the_float32_rate():
    load = imagenet(replace(xl2(), precision="bfloat16"))
    executed = executed_flops(load.config, **load.sizes)
    assert executed.in_float32 > 0
    machines = cluster(teraflops=None)
    fast, slow = (1e12 * machines.sustained_teraflops(name) for name in ("bfloat16", "float32"))
    seconds = executed.in_precision / fast + executed.in_float32 / slow
    assert slow < 0.5 * fast
    assert compute_seconds(load, machines, 1) == pytest.approx(seconds)
    # A measured rate is in model FLOPs; everything else that runs is included in it.
    assert compute_seconds(load, cluster(teraflops=40.0), 1) == pytest.approx(step_flops(xl2(), **load.sizes) / 40e12)


@pytest.mark.parametrize("passes", [1, 3])
def test_fsdp2_gathers_parameters_for_every_network_call(passes):
    guided = replace(debug().loss, guidance=GuidanceConfig(omega=1.0, kappa=0.5))
    plain = replace(debug().loss, guidance=GuidanceConfig())
    loads = {
        "training forward, backward, gradient": (replace(debug(), loss=plain), 3),
        "plus velocities": (replace(debug(), loss=guided), 4),
        "plus a separate du/dt": (replace(debug(), loss=guided, activation_checkpointing=True), 5),
    }
    for name, (config, times) in loads.items():
        load = workload(config, parallelism="fsdp2")
        assert payload_bytes(load, passes) == times * passes * load.gradient_bytes, name
    assert payload_bytes(workload(), passes) == 2 * workload().gradient_bytes  # DDP reduces once per step


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's counters of sent bytes")
def test_two_processes_send_the_predicted_bytes(tmp_path):
    run_processes(count_sent, (str(tmp_path),), 2, 240)
    sent = json.loads((tmp_path / "sent.json").read_text())
    for passes in (1, 2):
        ddp = workload(GUIDED)
        assert sent[f"ddp {passes}"] == pytest.approx(payload_bytes(ddp, passes) / 2, rel=0.02)
        # Gloo's reduce-scatter sends as much as an all-reduce: one gather more than predicted.
        predicted = payload_bytes(workload(GUIDED, parallelism="fsdp2"), passes) + passes * ddp.gradient_bytes
        assert sent[f"fsdp2 {passes}"] == pytest.approx(predicted / 2, rel=0.03)


def test_checkpoint_on_disk_has_the_predicted_size(tmp_path):
    config = replace(debug(), ema_decays=(0.9, 0.99))
    state = fresh_state(config)
    take_steps(state, config, 1)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        (tmp_path / "checkpoint").mkdir()
        save_train_state(state, config, tmp_path / "checkpoint")
    finally:
        distributed.destroy_process_group()
    written = sum(path.stat().st_size for path in (tmp_path / "checkpoint").iterdir())
    predicted = estimate(workload(config), cluster(), 1).checkpoint_bytes
    assert predicted < written < 1.02 * predicted + 30_000  # headers, and state.json


@pytest.mark.parametrize("mirrored", [True, False])
def test_latents_on_disk_have_the_predicted_size(mirrored):
    rows = 512
    moments = np.ones((rows, 8, 32, 32), np.float16)
    names = [f"n01440764/n01440764_{row}" for row in range(rows)]
    content = shard_bytes(moments, moments if mirrored else None, np.zeros(rows, np.int32), names, [])
    predicted = imagenet(xl2(), mirrored=mirrored).latent_bytes * rows / 1_281_167
    assert predicted < len(content) < 1.003 * predicted


def test_each_node_reads_and_uploads_its_part():
    load = imagenet(replace(debug(), checkpoint_interval_steps=1000))
    found = estimate(load, cluster(storage_gbyte=2.0), 16)
    assert found.node_images_per_second == pytest.approx(found.requested.images_per_second[1] / 2)
    assert found.copy_seconds == pytest.approx(1_281_167 * 2 * 8 * 32 * 32 * 2 / 2e9)
    assert found.upload_seconds == pytest.approx(found.checkpoint_bytes / 2 / 2e9)
    assert found.checkpoint_seconds == pytest.approx(tuple(1000 * seconds for seconds in found.requested.step_seconds))


def total(load: Workload, rows: int, num_shards: int = 1) -> int:
    return memory_estimate(load.config, **load.sizes, samples_per_pass=rows, num_shards=num_shards).total


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp2"])
def test_largest_micro_batch_fits_and_one_more_sample_does_not(parallelism):
    load = workload(replace(debug(), global_batch_size=64), parallelism=parallelism)
    shards = load.num_shards(2)
    assert shards == (2 if parallelism == "fsdp2" else 1)
    just_enough = total(load, 20, shards)
    assert just_enough < total(load, 21, shards)  # with fewer samples, Adam's temporaries exceed those of a pass
    assert largest_micro_batch(load, 2, just_enough) == 20
    assert largest_micro_batch(load, 2, 1e12) == 32  # the whole share
    assert largest_micro_batch(load, 2, 1e6) == 0


def test_default_micro_batch_fits_and_a_requested_one_may_not():
    load = workload(replace(debug(), global_batch_size=64))
    machines = small_gpu(total(load, 20))
    found = estimate(load, machines, 2, others=())
    # Each GPU's 32 samples take 2 passes of 16.
    assert (found.largest_micro_batch, found.requested.micro_batch_size, found.fits) == (20, 16, True)
    limited = estimate(replace(load, samples_per_pass=32), machines, 2, others=())
    assert (limited.largest_micro_batch, limited.requested.micro_batch_size, limited.fits) == (20, 32, False)
    assert "it does NOT fit; at most 20 of 32 samples fit" in describe_estimate("debug", limited)


def test_numbers_of_gpus_that_cannot_train_are_left_out():
    load = workload(replace(debug(), global_batch_size=64), parallelism="fsdp2")
    machines = small_gpu(total(load, 1, 8))
    found = estimate(load, machines, 8)
    assert found.largest_micro_batch == 1
    assert [training.num_gpus for training in found.trainings] == [8, 16, 32, 64]
    assert found.left_out == (1,)
    assert re.search(r"\n +1( +-)+\n?", describe_estimate("debug", found))
    assert estimate(replace(load, config=debug()), machines, 8).left_out == (1, 32, 64)  # the batch has 16 images


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("debug --gpus 12", r"gpus must be at most gpus_per_node = 8 or a multiple of it, but got 12; use 8"),
        ("debug --gpus 0", "gpus must be at least 1, but got 0"),
        ("debug --gpus 32", r"gpus must be at most global_batch_size = 16 \(one image per GPU\), but got 32; use"),
        ("debug --gpu v100", "gpu must be one of h200, h100, a100, a100-40, l4, but got 'v100'; for another GPU"),
        ("debug --teraflops 0", "teraflops must be above 0, but got 0"),
        ("debug --network-gbit -1", "network_gbit must be above 0, but got -1"),
        ("debug --epochs 2 --num-steps 7", "give --epochs 2 or --num-steps 7, but not both"),
        ("debug --epochs 0", "epochs must be above 0 and finite, but got 0"),
        ("debug --data nowhere", "latent dataset nowhere does not exist"),
        ("xl3", "unknown preset 'xl3'; known: s2, "),
    ],
)
def test_invalid_options_are_refused_with_a_remedy(arguments, message):
    with pytest.raises(InputError, match=message):
        plan(*parse_arguments(arguments.split()))


def test_network_that_does_not_fit_is_refused_with_ways_to_save_memory():
    machines = small_gpu(1_000_000)
    with pytest.raises(ValueError, match="one sample needs 0.0 GB, but A100 SXM, 80 GB has 0.0 GB .* --activation-ch"):
        estimate(workload(), machines, 1)
    without_options = workload(replace(debug(), activation_checkpointing=True), parallelism="fsdp2")
    with pytest.raises(ValueError, match="available; use a GPU with more memory, or a smaller network"):
        estimate(without_options, machines, 1)


def test_epochs_set_the_number_of_steps():
    _, job = parse_arguments(["xl2", "--epochs", "240"])
    # The preset's 240 epochs drop each epoch's last partial batch.
    assert build_workload(job).config.num_steps == pytest.approx(xl2().num_steps, rel=2e-4)
    _, job = parse_arguments(["debug", "--epochs", "1000", "--images", "10"])
    assert build_workload(job).config.num_steps == 1000 * 10 / debug().global_batch_size


def test_other_numbers_of_gpus_get_the_same_estimate_as_when_requested():
    for changes in ({"parallelism": "fsdp2"}, {"samples_per_pass": 4}):
        load, machines = workload(GUIDED, **changes), cluster(gpus_per_node=2)
        of_many = estimate(load, machines, 4, others=(1, 2))
        for training in of_many.trainings[:2]:
            assert training == estimate(load, machines, training.num_gpus, others=()).requested


def section(text: str, title: str) -> list[str]:
    [part] = [part for part in text.split("\n\n") if part.startswith(title)]
    return part.splitlines()[1:]


def test_command_prints_its_assumptions_and_writes_all_figures(tmp_path):
    file = tmp_path / "new" / "plan.json"
    arguments = f"debug --gpus 16 --precision bfloat16 --price-per-gpu-hour 2 --json {file}"
    text = plan(*parse_arguments(arguments.split()))
    assert re.search(r"a step, as executed +\d+\.\d+ [MG]FLOP, \d+\.\d+ [MG]FLOP of it in float32\n", text)
    assumed = "\n".join(section(text, "assumptions"))
    for value in (
        "119.0 of 989 TFLOP/s: matrix products at 0.6 of the H100 SXM's dense peak (a guess), the rest at 3.35 TB/s",
        "of 67 TFLOP/s",
        "337.5 GB/s",
        "100 Gbit/s",
        "1 GB/s",
        "74.0 of 80 GB",
    ):
        assert value in assumed
    table = section(text, "on other numbers of GPUs")
    assert [line.split()[0] for line in table] == ["GPUs", "1", "8", "16", "32", "64"]
    assert table[-1].split() == ["64", *["-"] * 7]
    content = json.loads(file.read_text())
    assert [entry["value"] for entry in content["assumptions"]]
    requested = content["estimate"]["requested"]
    assert requested["num_nodes"] == 2
    assert content["gradient_bytes"] == 4 * num_parameters(debug().network, **imagenet(debug()).sizes)
    assert f"{requested['compute_seconds']:.3f} s" in section(text, "a step on 16 GPUs")[0]


def test_measured_rates_replace_assumed_ones():
    arguments = ["debug", "--gpus", "1", "--teraflops", "123", "--link-gbyte", "77", "--network-gbit", "400"]
    text = plan(*parse_arguments(arguments))
    assumed = "\n".join(section(text, "assumptions"))
    assert "123 TFLOP/s of model FLOPs: --teraflops" in assumed
    assert "77 GB/s: --link-gbyte" in assumed
    assert "400 Gbit/s: --network-gbit" in assumed
    assert "peak" not in assumed
    assert "data sheet's 450" not in assumed
    assert "as executed" not in text  # in float32, a step executes its model FLOPs only


def test_options_reach_the_workload_and_the_cluster():
    arguments = "xl2 --images 1000 --latent-shape 16 64 64 --classes 7 --no-mirror --parallelism fsdp2"
    _, job = parse_arguments([*arguments.split(), "--samples-per-pass", "3", "--gpu", "l4", "--storage-gbyte", "3"])
    load, machines = build_workload(job), build_cluster(job)
    assert load == Workload(
        config=xl2(), num_images=1000, latent_shape=(16, 64, 64), num_classes=7, mirrored=False, parallelism="fsdp2",
        samples_per_pass=3,
    )  # fmt: skip
    assert load.latent_bytes == 1000 * 2 * 32 * 64 * 64
    assert machines.gpu == GPUS["l4"]
    assert (machines.link_gbyte, machines.storage_gbyte) == (12.0, 3.0)


def test_data_option_takes_sizes_from_the_manifest(image_root, tmp_path):
    images, output = str(image_root / "val"), str(tmp_path / "latents")
    job = EncodeJob(images=images, output=output, vae=str(SHIPPED_AUTOENCODER), image_size=64, mirror=False)
    manifest = encode_without_ray(job)
    load = build_workload(PlanJob(config=debug(), data=output))
    assert load.num_images == manifest.num_samples
    assert load.latent_shape == manifest.latent_shape
    assert load.num_classes == len(manifest.class_names)
    assert not load.mirrored
