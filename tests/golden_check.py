"""Compares the core with values computed by the authors' JAX code: python tests/golden_check.py FILE...

Each file contains a training step of a tiny network (parameters, random draws, outputs and gradients) and the outputs of
one-step and two-step sampling. Prints the relative error (by norm) of each quantity and the largest of the gradients.
Where the reference's norm is below 1e-6, the error is absolute, and 1e-6 counts as 1e-4. The exit code is 0 if all errors
are at most 1e-4.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from meanflow_core.config import (
    DiTConfig,
    GuidanceConfig,
    ImprovedDiTConfig,
    ImprovedMeanFlowConfig,
    LossConfig,
    MeanFlowConfig,
    NetworkConfig,
    TimeSamplingConfig,
)
from meanflow_core.generator import build_pipeline
from meanflow_core.interop.conversion import from_official
from meanflow_core.networks.building import build_network
from meanflow_core.networks.interface import Conditioning, NetworkModel
from meanflow_core.objectives.draws import GUIDANCE_INPUTS, StepDraws
from meanflow_core.objectives.flow import LossOutput
from meanflow_core.objectives.interface import build_objective

GOLDEN_FOLDER = Path(__file__).parent / "data" / "golden"
BOUND = 1e-4
FLOOR = 1e-6
CPU = torch.device("cpu")
# {name of a draw in the files: name in StepDraws}
DRAWS = {name: name for name in ("t", "r", "noise", "label_dropped", "omega")} | {
    "t_min": "guidance_interval_start",
    "t_max": "guidance_interval_end",
}


def load(path: Path) -> dict[str, np.ndarray]:
    """Loads the arrays of a file."""
    with np.load(path, allow_pickle=False) as golden:
        return {key: golden[key] for key in golden.files}


def difference(ours: torch.Tensor, theirs: np.ndarray | torch.Tensor) -> float:
    """Relative error by norm. If the reference's norm is below FLOOR, an absolute error of FLOOR counts as BOUND."""
    ours, theirs = ours.detach().double().cpu(), torch.as_tensor(theirs).double().cpu()
    if ours.shape != theirs.shape:
        raise ValueError(f"the shape must be {tuple(theirs.shape)}, but is {tuple(ours.shape)}")
    error, norm = float((ours - theirs).norm()), float(theirs.norm())
    return error / norm if norm >= FLOOR else error / FLOOR * BOUND


def read_settings(golden: Mapping[str, np.ndarray]) -> tuple[NetworkConfig, dict, LossConfig]:
    """Translates the file's `config` from the authors' names: the network, its input shape and the objective."""
    settings = json.loads(str(golden["config"]))
    is_improved = "net" in settings
    network, method = settings["net" if is_improved else "dit"], settings["method"]
    sizes = {name: network[name] for name in ("patch_size", "hidden_size", "depth", "num_heads")}
    config = DiTConfig(**sizes, mlp_ratio=network.get("mlp_ratio", 4.0))
    if is_improved:
        aux_head_depth = network.get("aux_head_depth", 8)
        config = ImprovedDiTConfig(**sizes, mlp_ratio=network.get("mlp_ratio", 8 / 3), aux_head_depth=aux_head_depth)
    shape = {
        "sample_size": network["input_size"],
        "in_channels": network["in_channels"],
        "num_classes": network["num_classes"],
    }
    common = {
        "times": TimeSamplingConfig(fraction_r_below_t=1.0 - method.get("data_proportion", 0.75)),
        "norm_p": method["norm_p"],
        "norm_eps": method["norm_eps"],
    }
    if is_improved:
        return config, shape, ImprovedMeanFlowConfig(**common)
    guidance = GuidanceConfig()
    if method.get("guidance_eq", "cfg") != "none":
        guidance = GuidanceConfig(
            omega=method["omega"],
            kappa=method["kappa"],
            guidance_interval_start=method.get("t_start", 0.0),
            guidance_interval_end=method.get("t_end", 1.0),
        )
    return config, shape, MeanFlowConfig(**common, guidance=guidance)


def parameters(golden: Mapping[str, np.ndarray], prefix: str) -> dict[str, torch.Tensor]:
    """The arrays with this prefix, converted to this project's parameter names."""
    return from_official({key[len(prefix) :]: golden[key] for key in golden if key.startswith(prefix)})


def check(
    golden: Mapping[str, np.ndarray], *, separate_derivative: bool = False, device: torch.device = CPU
) -> dict[str, float]:
    """{quantity: relative error} of every output, gradient and sample in a file."""
    network_config, shape, loss_config = read_settings(golden)
    network = build_network(network_config, **shape)
    network.load_state_dict(parameters(golden, "param:"))
    network.to(device)

    draws = {ours: torch.from_numpy(np.asarray(golden[theirs])) for theirs, ours in DRAWS.items() if theirs in golden}
    latents = torch.from_numpy(golden["latents"]).to(device)
    labels = torch.from_numpy(golden["labels"]).long().to(device)
    unused = {"posterior_noise": torch.zeros_like(draws["noise"]), "mirrored": torch.zeros_like(draws["label_dropped"])}
    objective = build_objective(loss_config)
    record = objective.record(StepDraws(**draws, **unused), 0, len(labels)).to(device)
    draws = {name: values.to(device) for name, values in draws.items()}
    null_label = shape["num_classes"]
    output: LossOutput = objective.loss(
        network, network, latents, labels, record,
        null_label=null_label, global_num_rows=len(labels), separate_derivative=separate_derivative,
    )  # fmt: skip
    output.loss.backward()

    # du/dt of the whole batch, along the tangent from the authors' code.
    column = draws["t"].view(-1, 1, 1, 1)
    z = (1.0 - column) * latents + column * draws["noise"]
    guidance = {name: draws[name] for name in GUIDANCE_INPUTS if name in draws}
    conditioning = Conditioning(
        t=draws["t"], r=draws["r"], labels=torch.where(draws["label_dropped"], null_label, labels), **guidance
    )
    tangent = torch.from_numpy(golden["jvp_tangent" if "jvp_tangent" in golden else "v_guided"]).to(device)
    dudt = network(z, conditioning, tangent).dudt

    errors = {
        "u": difference(output.u, golden["u"]),
        "du/dt": difference(dudt, golden["dudt"]),
        "du/dt in the loss": difference(output.dudt[record.plan.below], golden["dudt"][record.plan.below.cpu()]),
        "v_guided": difference(output.v_guided, golden["v_guided"]),
        "loss": difference(output.loss, golden["loss"]),
    }
    if "v" in golden:
        errors["v"] = difference(output.v, golden["v"])
    if "jvp_tangent" in golden:
        errors["tangent"] = difference(output.tangent, golden["jvp_tangent"][record.plan.below.cpu()])
    for name, theirs in parameters(golden, "grad:").items():
        ours = dict(network.named_parameters())[name].grad
        errors[f"gradient of {name}"] = difference(torch.zeros_like(theirs) if ours is None else ours, theirs)
    errors |= check_sampling(network, golden)
    return errors


def check_sampling(network: NetworkModel, golden: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Compares the pipeline's latents after one and two steps."""
    guidance = {}
    if "sample_guidance" in golden:
        scale, start, end = (float(value) for value in golden["sample_guidance"])
        guidance = {"guidance_scale": scale, "guidance_interval": (start, end)}
    pipeline = build_pipeline(network, None, [])  # latents only, no autoencoder
    noise, labels = torch.from_numpy(golden["noise"]), golden["labels"].tolist()
    return {
        key: difference(pipeline.sample_latents(labels, noise, num_steps, **guidance), golden[key])
        for num_steps, key in ((1, "sample_1_step"), (2, "sample_2_steps"))
    }


def main() -> int:
    """Checks each file and prints the errors."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    holds = True
    for path in parser.parse_args().files:
        errors = check(load(path))
        gradients = {name: error for name, error in errors.items() if name.startswith("gradient of ")}
        worst = max(gradients, key=lambda name: gradients[name])
        print(f"{path.name}")
        for name, error in errors.items():
            if name not in gradients:
                print(f"  {name:24s} {error:.1e}")
        print(f"  {'gradients':24s} {gradients[worst]:.1e}  (largest of {len(gradients)}: {worst[12:]})")
        missed = [name for name, error in errors.items() if not error <= BOUND]
        print(f"  largest {max(errors.values()):.1e}, at most {BOUND:g}: {'FAILED' if missed else 'passed'}")
        holds &= not missed
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
