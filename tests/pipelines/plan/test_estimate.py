"""Estimates compared with hand calculations, the runbook's figures, and bytes counted on this machine."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import distributed

from meanflow_core.checkpoint import save_train_state
from meanflow_core.config import GuidanceConfig, TrainingConfig
from meanflow_core.presets.demo import debug
from meanflow_core.presets.meanflow import xl2
from pipelines.demo.autoencoder import SHIPPED_AUTOENCODER
from pipelines.encode.job import EncodeJob
from pipelines.errors import InputError
from pipelines.latents.shards import shard_bytes
from pipelines.plan.__main__ import parse_arguments
from pipelines.plan.cost import checkpoint_bytes, executed_flops, memory_estimate, step_flops
from pipelines.plan.estimate import (
    compute_seconds,
    estimate,
    gradient_bytes,
    largest_micro_batch,
    payload_bytes,
    ring_seconds,
)
from pipelines.plan.hardware import GPUS, Cluster
from pipelines.plan.job import PlanJob, Workload
from pipelines.plan.report import describe_estimate
from pipelines.plan.run import plan, resolve_workload
from tests.support.latents import encode_without_ray
from tests.support.processes import run_group
from tests.support.sent_bytes import GUIDED, count_sent
from tests.support.training_steps import fresh_state, take_steps

RUNBOOK = Path(__file__).parents[3] / "docs/how-to/aws.md"


def cluster(**changes) -> Cluster:
    return Cluster(**{"gpu": "a100", "teraflops": 50.0, "link_gbyte": 200.0, **changes})


def workload(config: TrainingConfig | None = None, **changes) -> Workload:
    return Workload(**{"config": config or debug(), "images": 40, "latent_shape": (4, 8, 8), "classes": 10, **changes})


@pytest.fixture
def small_gpu(monkeypatch) -> Callable[[int], Cluster]:
    """Makes a cluster whose GPUs have this many usable bytes."""

    def make(memory: int) -> Cluster:
        monkeypatch.setitem(GPUS, "a100", replace(GPUS["a100"], memory_bytes=(memory + 2e9) / 0.95))
        return cluster()

    return make


def runbook_number(pattern: str) -> str:
    """The digits in place of NUMBER in a phrase that must occur exactly once in the runbook."""
    [digits] = re.findall(re.escape(pattern).replace("NUMBER", r"([\d.,]*\d)"), RUNBOOK.read_text())
    return digits.replace(",", "")


def section(text: str, title: str) -> list[str]:
    [part] = [part for part in text.split("\n\n") if part.startswith(title)]
    return part.splitlines()[1:]


def test_runbook_figures_match_the_estimate():
    sustained = float(runbook_number("A GPU **sustains NUMBER TFLOP/s**"))
    price = float(runbook_number("A node of 8 GPUs costs **NUMBER dollars an hour**")) / 8
    machines = cluster(teraflops=sustained, price_per_gpu_hour=price)
    load = Workload(config=replace(xl2(), precision="tf32", mirror=True))  # both mirrors are encoded
    many, one_node = estimate(load, machines, 32), estimate(load, machines, 8)
    hours = one_node.step_seconds[0] * load.config.num_steps / 3600
    expected = {
        "NUMBER TFLOP a step": step_flops(load.config, **load.sizes) / 1e12,
        "One node of 8: NUMBER s a step": one_node.compute_seconds,
        "At the assumed rate, a step takes NUMBER s on 32 GPUs": many.compute_seconds,
        "gradients once: NUMBER GB in float32": gradient_bytes(load) / 1e9,
        "GPU: NUMBER GB a step at 32": many.gpu_bytes / 1e9,
        "Over 100 Gbit/s of TCP it takes NUMBER s a step": many.communication_seconds,
        "A GPU needs NUMBER GB with 8 samples per pass": total(load, many.micro_batch_size) / 1e9,
        "a checkpoint of NUMBER GB": checkpoint_bytes(load.config, **load.sizes) / 1e9,
        "every 2,500 steps: NUMBER minutes on 32 GPUs": 2500 * many.compute_seconds / 60,
        "both mirrors | 0.5 h | 0.1 h | | 11 | NUMBER GB in 2,503 shards": load.latent_bytes / 1e9,
        "checkpoints; NUMBER GB on each node": replace(load, config=xl2()).latent_bytes
        / 1e9,  # trained without mirrors
        "NUMBER h: 9.0 days": hours,
    }
    for pattern, value in expected.items():
        number = runbook_number(pattern)
        num_decimals = len(number.partition(".")[2])
        assert float(number) == pytest.approx(value, abs=0.5000001 * 10**-num_decimals), pattern
    # These two are rounded to tens.
    assert float(runbook_number("To hide the communication, **NUMBER Gbit/s a node**")) == round(many.hiding_gbit, -1)
    assert float(runbook_number("9.0 days | 54.1 h: 2.3 days | 27.0 h | NUMBER; spot")) == round(8 * price * hours, -1)


def test_slowest_link_limits_the_ring():
    assert ring_seconds(80e9, cluster(), 32) == pytest.approx(80e9 / 12.5e9)  # the network
    assert ring_seconds(80e9, cluster(), 4) == pytest.approx(80e9 / 200e9)  # one node: its links
    assert ring_seconds(80e9, cluster(network_gbit=6400.0), 32) == pytest.approx(80e9 / 200e9)
    assert estimate(workload(), cluster(), 4).gpu_bytes == 2 * gradient_bytes(workload()) * 3 / 4
    assert estimate(workload(), cluster(), 1).communication_seconds == 0.0


def test_table_follows_from_compute_and_communication():
    load, machines = workload(replace(debug(), num_steps=10**9)), cluster(teraflops=0.02, price_per_gpu_hour=3.0)
    found = estimate(load, machines, 16)
    compute, sent = found.compute_seconds, found.communication_seconds
    assert compute == pytest.approx(step_flops(load.config, **load.sizes) / 16 / 0.02e12)
    assert found.step_seconds == (max(compute, sent), compute + sent)
    lines = section(describe_estimate("debug", load, machines, 16), "the training, by number of GPUs")
    [cells] = [re.split(r"  +", line.strip()) for line in lines if line.split()[0] == "16"]
    columns = dict(zip(re.split(r"  +", lines[0].strip()), cells, strict=True))
    shortest, longest = found.step_seconds
    hours = [16 * seconds * 1e9 / 3600 for seconds in (shortest, longest)]
    assert columns["nodes"] == "2"
    assert columns["images/s"] == f"{16 / longest:,.0f} to {16 / shortest:,.0f}"
    assert columns["days"] == f"{hours[0] / 16 / 24:,.1f} to {hours[1] / 16 / 24:,.1f}"
    assert columns["GPU hours"] == f"{hours[0]:,.0f} to {hours[1]:,.0f}"
    assert columns["cost"] == f"{3 * hours[0]:,.0f} to {3 * hours[1]:,.0f}"
    assert columns["efficiency"] == f"{100 * compute / longest:.0f} to {100 * compute / shortest:.0f} %"
    [alone] = [line for line in lines if line.split()[0] == "1"]
    assert alone.endswith("100 %")


def test_step_takes_as_long_as_the_gpu_with_the_most_samples():
    load = workload(replace(debug(), global_batch_size=16))
    of_three, of_two = (compute_seconds(load, cluster(), number) for number in (3, 2))
    assert of_three / of_two == pytest.approx(6 / 8)


def test_assumed_rates_match_published_ones():
    h800 = cluster(gpu="h100", teraflops=None)
    assert h800.sustained_teraflops("bfloat16") == pytest.approx(119.0)
    # In tf32, the runbook assumes 50 TFLOP/s for an A100 and 100 TFLOP/s for an H100.
    a100 = cluster(gpu="a100", teraflops=None)
    assert a100.sustained_teraflops("tf32") == pytest.approx(50.0, rel=0.1)
    assert h800.sustained_teraflops("tf32") == pytest.approx(100.0, rel=0.1)
    precisions = ("float32", "tf32", "bfloat16")
    for name_of_gpu, gpu in GPUS.items():
        rates = [cluster(gpu=name_of_gpu).sustained_teraflops(name) for name in precisions]
        assert rates == sorted(rates)
        assert all(rate < gpu.peak_teraflops[name] for rate, name in zip(rates, precisions, strict=True))


@pytest.mark.parametrize(("precision", "at_most"), [("tf32", 0.8), ("float32", 0.6)])
def test_derivative_under_bfloat16_runs_at_its_own_rate(precision, at_most):
    load = Workload(config=replace(xl2(), precision="bfloat16", derivative_precision=precision))
    executed = executed_flops(load.config, **load.sizes)
    assert executed.of_derivative > 0
    machines = cluster(teraflops=None)
    fast, slow = (1e12 * machines.sustained_teraflops(name) for name in ("bfloat16", precision))
    seconds = executed.in_precision / fast + executed.of_derivative / slow
    assert slow < at_most * fast
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
        assert payload_bytes(load, passes) == times * passes * gradient_bytes(load), name
    assert payload_bytes(workload(), passes) == 2 * gradient_bytes(workload())  # DDP reduces once per step


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's counters of sent bytes")
def test_two_processes_send_the_predicted_bytes():
    sent = run_group(count_sent, (), 2, timeout_seconds=240)
    for passes in (1, 2):
        ddp = workload(GUIDED)
        assert sent[f"ddp {passes}"] == pytest.approx(payload_bytes(ddp, passes) / 2, rel=0.02)
        # Gloo's reduce-scatter sends as much as an all-reduce: one gather more than predicted.
        predicted = payload_bytes(workload(GUIDED, parallelism="fsdp2"), passes) + passes * gradient_bytes(ddp)
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
    predicted = checkpoint_bytes(config, **workload().sizes)
    assert predicted < written < 1.02 * predicted + 30_000  # headers, and state.json


@pytest.mark.parametrize("mirrored", [True, False])
def test_latents_on_disk_have_the_predicted_size(mirrored):
    rows = 512
    moments = np.ones((rows, 8, 32, 32), np.float16)
    names = [f"n01440764/n01440764_{row}" for row in range(rows)]
    content = shard_bytes(moments, moments if mirrored else None, np.zeros(rows, np.int32), names, [])
    predicted = Workload(config=replace(xl2(), mirror=mirrored)).latent_bytes * rows / 1_281_167
    assert predicted < len(content) < 1.003 * predicted


def test_each_node_reads_and_uploads_its_part():
    load = Workload(config=replace(debug(), checkpoint_interval_steps=1_000_000_000))
    machines = cluster(storage_gbyte=2e-3)
    found = estimate(load, machines, 16)
    text = describe_estimate("debug", load, machines, 16)
    assert f"read       at most {16 / found.step_seconds[0] / 2:,.0f} images/s" in text
    hours = 1_281_167 * 2 * 8 * 32 * 32 * 2 / 2e6 / 3600
    assert f"copied in  {hours:.2f} hours, once" in text
    assert f"upload  {checkpoint_bytes(load.config, **load.sizes) / 2 / 2e6:.1f} s, each node its part" in text
    shortest, longest = (1e9 * seconds / 3600 for seconds in found.step_seconds)
    assert f"every   {shortest:.2f} hours to {longest:.2f} hours" in text


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


def test_default_micro_batch_fits_and_a_requested_one_may_not(small_gpu):
    load = workload(replace(debug(), global_batch_size=64))
    machines = small_gpu(total(load, 20))
    found = estimate(load, machines, 2)
    assert (found.largest_micro_batch, found.micro_batch_size) == (20, 16)  # each GPU's 32 samples take 2 passes of 16
    assert "it fits; at most 20 of 32 samples fit" in describe_estimate("debug", load, machines, 2)
    limited = replace(load, samples_per_pass=32)
    assert estimate(limited, machines, 2).micro_batch_size == 32
    assert "it does NOT fit; at most 20 of 32 samples fit" in describe_estimate("debug", limited, machines, 2)


def test_other_numbers_of_gpus_use_micro_batches_that_fit(small_gpu):
    load = workload(replace(debug(), global_batch_size=64), parallelism="fsdp2", samples_per_pass=8)
    machines = replace(small_gpu(total(load, 4, 8)), link_gbyte=0.001)
    assert estimate(load, machines, 8).largest_micro_batch == 4
    table = section(describe_estimate("debug", load, machines, 64), "the training, by number of GPUs")
    [row] = [line.split() for line in table if line.split()[0] == "8"]
    fitting = estimate(replace(load, samples_per_pass=4), machines, 8)  # two passes gather the parameters twice
    assert row[2] == f"{fitting.step_seconds[0]:.3f}"
    assert row[2] != f"{estimate(load, machines, 8).step_seconds[0]:.3f}"


def test_numbers_of_gpus_that_cannot_train_are_left_out(small_gpu):
    def numbers(load: Workload) -> list[str]:
        table = section(describe_estimate("debug", load, machines, 8), "the training, by number of GPUs")
        return [line.split()[0] for line in table[1:]]

    load = workload(replace(debug(), global_batch_size=64), parallelism="fsdp2")
    machines = small_gpu(total(load, 1, 8))
    assert numbers(load) == ["8", "16", "32", "64"]  # on one GPU, not even one sample fits
    assert numbers(replace(load, config=debug())) == ["8", "16"]  # the batch has 16 images


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("debug --gpus 12", r"gpus must be at most gpus_per_node = 8 or a multiple of it, but got 12; use 8"),
        ("debug --gpus 0", "gpus must be at least 1, but got 0"),
        ("debug --gpus 32", r"gpus must be at most global_batch_size = 16 \(one image per GPU\), but got 32; use"),
        ("debug --gpu v100", "gpu must be one of h200, h100, a100, a100-40, l4, but got 'v100'; for another GPU"),
        ("debug --teraflops 0", "teraflops must be above 0 and finite, but got 0"),
        ("debug --network-gbit -1", "network_gbit must be above 0 and finite, but got -1"),
        ("debug --epochs 2 --num-steps 7", "give --epochs 2 or --num-steps 7, but not both"),
        ("debug --epochs 0", "epochs must be above 0 and finite, but got 0"),
        ("debug --data nowhere", "latent dataset nowhere does not exist"),
        ("xl3", "unknown preset 'xl3'; known: .*, s2, "),
    ],
)
def test_invalid_options_are_refused_with_a_remedy(arguments, message):
    with pytest.raises(InputError, match=message):
        plan(*parse_arguments(arguments.split()))


def test_network_that_does_not_fit_is_refused_with_ways_to_save_memory(small_gpu):
    machines = small_gpu(1_000_000)
    with pytest.raises(ValueError, match="one sample needs 0.0 GB, but A100 SXM, 80 GB has 0.0 GB .* --activation-ch"):
        estimate(workload(), machines, 1)
    without_options = workload(replace(debug(), activation_checkpointing=True), parallelism="fsdp2")
    with pytest.raises(ValueError, match="available; use a GPU with more memory, or a smaller network"):
        estimate(without_options, machines, 1)


def test_epochs_set_the_number_of_steps():
    _, job = parse_arguments(["xl2", "--epochs", "240"])
    # The preset's 240 epochs drop each epoch's last partial batch.
    assert resolve_workload(job).config.num_steps == pytest.approx(xl2().num_steps, rel=2e-4)
    _, job = parse_arguments(["debug", "--epochs", "1000", "--images", "10"])
    assert resolve_workload(job).config.num_steps == 1000 * 10 / debug().global_batch_size


def test_command_prints_its_assumptions():
    text = plan(*parse_arguments(["debug", "--gpus", "16", "--precision", "bfloat16", "--price-per-gpu-hour", "2"]))
    assert re.search(r"a step, as executed +\d+\.\d+ [MG]FLOP, \d+\.\d+ [MG]FLOP of it in tf32\n", text)
    assumed = "\n".join(section(text, "assumptions"))
    for value in (
        "119.0 of 989 TFLOP/s: matrix products at 0.6 of the H100 SXM's dense peak (a guess), the rest at 3.35 TB/s",
        "of 494 TFLOP/s",
        "337.5 GB/s",
        "100 Gbit/s",
        "1 GB/s",
        "74.0 of 80 GB",
        "2: --price-per-gpu-hour",
    ):
        assert value in assumed


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
    arguments = "xl2 --images 1000 --latent-shape 16 64 64 --classes 7 --mirror --parallelism fsdp2"
    _, job = parse_arguments([*arguments.split(), "--samples-per-pass", "3", "--gpu", "l4", "--storage-gbyte", "3"])
    assert resolve_workload(job) == Workload(
        config=replace(xl2(), mirror=True),
        images=1000,
        latent_shape=(16, 64, 64),
        classes=7,
        parallelism="fsdp2",
        samples_per_pass=3,
    )
    assert resolve_workload(job).latent_bytes == 1000 * 2 * 2 * 32 * 64 * 64
    assert job.cluster == Cluster(gpu="l4", storage_gbyte=3.0)
    assert job.cluster.sustained_link_gbyte == 12.0


def test_data_option_takes_sizes_from_the_manifest(image_root, tmp_path):
    images, output = str(image_root / "val"), str(tmp_path / "latents")
    job = EncodeJob(images=images, output=output, vae=str(SHIPPED_AUTOENCODER), image_size=64, mirror=False)
    manifest = encode_without_ray(job)
    load = resolve_workload(PlanJob(workload=Workload(config=debug()), data=output))
    assert load.images == manifest.num_samples
    assert load.latent_shape == manifest.latent_shape
    assert load.classes == len(manifest.class_names)
    assert not load.config.mirror
