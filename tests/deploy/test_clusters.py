"""Tests the cluster files for `ray up`: Ray accepts them, and the stages find what they need. Starts no machine."""

import copy
import re
import shlex
from pathlib import Path

import pytest
import yaml
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from deploy.spot_notice import parse_arguments
from tests.support.aws import parse_aws
from tests.support.command_lines import parse_job
from tests.support.readme import text_of

CLOUDS = ("ray_cluster.yaml", "deploy/clusters/gcp.yaml")
LOCAL = "deploy/clusters/local.yaml"
ALL = (*CLOUDS, LOCAL)


def loaded(name: str) -> dict:
    return yaml.safe_load(text_of(name))


def prepared(text: str) -> dict:
    """The cluster file with Ray's defaults, validated against Ray's schema."""
    config = prepare_config(copy.deepcopy(yaml.safe_load(text)))
    validate_config(config)
    return config


def with_efa(text: str) -> str:
    """The file with its commented-out lines for EFA enabled."""
    return re.sub(r"^#efa", "    ", text, flags=re.MULTILINE)


def start_options(commands: list[str]) -> list[str]:
    [start] = [command for command in commands if "ray start" in command]
    return shlex.split(start[start.index("ray start") :])


def container_options(config: dict, kind: str) -> list[str]:
    """Docker options for workers of a node type."""
    own = config.get("available_node_types", {}).get(kind, {}).get("docker", {})
    return config["docker"]["run_options"] + own.get("worker_run_options", [])


def initialization(config: dict) -> dict[str, list[str]]:
    """{node type: its commands before the container starts}."""
    common = config["initialization_commands"]
    return {
        kind: settings.get("initialization_commands", common)
        for kind, settings in config["available_node_types"].items()
    }


@pytest.mark.parametrize("name", ALL)
def test_cluster_file_is_valid_and_its_start_commands_parse(name):
    config = prepared(text_of(name))
    assert config["max_workers"] >= sum(kind["min_workers"] for kind in config["available_node_types"].values())
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        start.make_context("ray start", start_options(commands)[2:])


def test_misspelt_key_is_rejected():
    with pytest.raises(Exception, match="idle_timeout_minuets"):
        prepared(text_of("ray_cluster.yaml").replace("idle_timeout_minutes", "idle_timeout_minuets"))


def test_commented_lines_for_efa_are_valid():
    plain, fast = (prepared(text) for text in (text_of("ray_cluster.yaml"), with_efa(text_of("ray_cluster.yaml"))))
    for kind in ("gpu", "gpu_spot"):
        assert "NetworkInterfaces" not in plain["available_node_types"][kind]["node_config"]
        interfaces = fast["available_node_types"][kind]["node_config"]["NetworkInterfaces"]
        assert {card["InterfaceType"] for card in interfaces} == {"efa"}
        added = set(container_options(fast, kind)) - set(container_options(plain, kind))
        assert {"--device=/dev/infiniband", "--volume /opt/amazon:/opt/amazon:ro", "--env FI_PROVIDER=efa"} <= added


@pytest.mark.parametrize("name", CLOUDS)
def test_cloud_scales_from_zero_and_prefers_spot_machines(name):
    config = loaded(name)
    kinds = config["available_node_types"]
    assert set(kinds) == {"head", "gpu", "gpu_spot", "cpu"}
    assert (kinds["head"]["resources"]["CPU"], kinds["head"]["max_workers"]) == (0, 0)  # the head takes no tasks
    for kind in ("gpu", "gpu_spot", "cpu"):
        assert (kinds[kind]["min_workers"], kinds[kind]["max_workers"] > 0) == (0, True)
    spot = {kind: bool(re.search("spot|preemptible", yaml.safe_dump(kinds[kind]["node_config"]))) for kind in kinds}
    assert spot == {
        "head": False,
        "gpu": False,
        "gpu_spot": True,
        "cpu": False,
    }  # a job ends with its driver, on the head
    assert kinds["gpu_spot"]["priority"] > kinds["gpu"].get("priority", 0)
    # Otherwise Ray starts the machines of a training run in several rounds.
    assert config["upscaling_speed"] >= kinds["gpu"]["max_workers"]
    # Long enough for the next job to reuse the machines, short enough to end forgotten ones.
    assert 5 <= config["idle_timeout_minutes"] <= 30
    # The disk of a stopped machine still costs money, and its latents are lost.
    assert config["provider"].get("cache_stopped_nodes", False) is False


@pytest.mark.parametrize("name", ALL)
def test_machines_run_one_image_and_share_storage_and_mlflow(name):
    docker = loaded(name)["docker"]
    assert not {"head_image", "worker_image"} & set(docker)
    assert docker["pull_before_run"] is True  # otherwise a machine may keep an older image with the same tag
    assert re.search(r"image: \S+  +# CHANGE", text_of(name))
    options = "\n".join(docker["run_options"])
    assert "MLFLOW_TRACKING_URI=http" in options
    assert "--volume /mnt/shared:/mnt/shared" in options


@pytest.mark.parametrize("name", ALL)
def test_dashboard_is_on_loopback_and_every_node_requires_the_token(name):
    config = loaded(name)
    # Ray's defaults for AWS and Google Cloud bind the dashboard, which executes code, to every interface.
    assert "--dashboard-host=127.0.0.1" in start_options(config["head_start_ray_commands"])
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert not re.search(r"(SECRET|ACCESS_KEY|PASSWORD|TOKEN)\w*\s*[=:]\s*\S", text_of(name))


@pytest.mark.parametrize("name", ALL)
def test_workers_join_the_head_and_some_have_the_label_that_evaluate_selects(name):
    config = prepared(text_of(name))
    head, worker = (start_options(config[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    [port] = [option.removeprefix("--port=") for option in head if option.startswith("--port=")]
    assert f"--address=$RAY_HEAD_IP:{port}" in worker
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head  # where Ray puts it
    if name == LOCAL:
        assert {"--num-cpus=0", "--num-gpus=0"} <= set(head)  # the head takes no tasks
        given = [option.removeprefix("--labels=") for option in (*head, *worker) if option.startswith("--labels=")]
        labels = [dict([text.split("=")]) for text in given]
    else:
        labels = [kind["labels"] for kind in config["available_node_types"].values()]
    for one in labels:
        validate_node_label_syntax(one)
    assert {"meanflow/pool": "cpu"} in labels  # tests/deploy/test_jobs.py checks evaluate's selector


@pytest.mark.parametrize("name", CLOUDS)
def test_workers_of_a_cloud_watch_for_the_preemption_notice(name):
    config = prepared(text_of(name))
    [watch] = [command for command in config["worker_start_ray_commands"] if "spot_notice" in command]
    command, redirection = watch.split(" > ")
    detached, *module = shlex.split(command)[:4]
    assert (detached, module) == ("setsid", ["python", "-m", "deploy.spot_notice"])
    assert redirection.endswith("2>&1 < /dev/null &")  # otherwise it ends with the shell that starts it
    job = parse_arguments(shlex.split(command)[4:])
    assert job.cloud == config["provider"]["type"]
    assert f"--address={job.address}" in start_options(config["worker_start_ray_commands"])
    assert not any("spot_notice" in command for command in config["head_start_ray_commands"])


@pytest.mark.parametrize("name", CLOUDS)
def test_machines_create_mounted_folders_and_log_in_to_the_clouds_registry(name):
    config = loaded(name)
    options = config["docker"]["run_options"]
    mounted = [option.split()[1].split(":")[0] for option in options if option.startswith("--volume")]
    assert len(mounted) == 2
    for kind, commands in initialization(config).items():
        for folder in mounted:
            assert any(f"mkdir -p {folder}" in line or f" {folder} " in line for line in commands), (kind, folder)
        for command in commands:
            assert shlex.split(command)
        [login] = [command for command in commands if "docker login" in command or "configure-docker" in command]
        if name == "ray_cluster.yaml":
            words = shlex.split(login)
            assert config["provider"]["region"] in words
            assert parse_aws(words[1 : words.index("|")]).operation == "GetAuthorizationToken"
    assert "project_id" in config["provider"] or config["provider"]["type"] == "aws"  # Ray's schema does not require it


@pytest.mark.parametrize("name", ALL)
def test_containers_of_gpu_machines_have_limits_variables_and_folders_for_training(name):
    config = loaded(name)
    _, train = parse_job("train")
    evaluate = parse_job("evaluate")
    for kind in ("gpu", "gpu_spot"):
        options = container_options(config, kind)
        assert {"--ulimit nofile=65536:65536", "--ulimit memlock=-1:-1"} <= set(options)
        environment = [option.removeprefix("--env ") for option in options if option.startswith("--env")]
        variables = dict(option.split("=", 1) for option in environment)
        assert variables["NCCL_SOCKET_IFNAME"] == "^lo,docker"
        assert int(variables["TORCH_FR_BUFFER_SIZE"]) > 0
        assert variables["HF_HOME"].startswith("/mnt/shared/")  # one download for all machines
        volumes = [option.removeprefix("--volume ") for option in options if option.startswith("--volume")]
        mounts = dict(volume.split(":")[:2] for volume in volumes)
        assert mounts["/mnt/local"] == str(Path(train.cache_dir).parent)  # latents are copied to the machine's own disk
        assert str(evaluate.output).startswith(mounts["/mnt/shared"] + "/")


def test_aws_machines_have_the_disks_and_the_network_that_the_runbook_states():
    config = yaml.safe_load(with_efa(text_of("ray_cluster.yaml")))
    assert config["auth"]["ssh_user"] == "ubuntu"  # the user of the images in the file
    kinds = config["available_node_types"]
    for kind in ("gpu", "gpu_spot"):
        node = kinds[kind]["node_config"]
        assert node["InstanceType"] == "p4d.24xlarge"
        # Index 0 is the machine's primary interface. Source: AWS's documentation on multiple network cards.
        cards = [(card["NetworkCardIndex"], card["DeviceIndex"]) for card in node["NetworkInterfaces"]]
        assert cards == [(0, 0), (1, 1), (2, 1), (3, 1)]
        [disk] = [command for command in kinds[kind]["initialization_commands"] if "/mnt/local" in command]
        assert "mount --bind /opt/dlami/nvme /mnt/local" in disk
    for settings in kinds.values():
        [disk] = settings["node_config"]["BlockDeviceMappings"]
        assert disk["Ebs"]["VolumeSize"] >= 150  # GB: the image, its layers, and a checkpoint that is being written
    assert "GPU" not in kinds["cpu"]["resources"]
    assert not kinds["cpu"]["node_config"]["InstanceType"].startswith(("p", "g"))


def test_google_machines_have_drivers_an_account_and_room_for_the_latents():
    config = loaded("deploy/clusters/gcp.yaml")
    zone = config["provider"]["availability_zone"]
    for kind, settings in config["available_node_types"].items():
        node, has_gpus = settings["node_config"], kind.startswith("gpu")
        items = node.get("metadata", {}).get("items", [])
        assert ({"key": "install-nvidia-driver", "value": "True"} in items) == has_gpus
        # Ray looks for the driver when it starts the container.
        assert ("nvidia-smi" in initialization(config)[kind][0]) == has_gpus
        assert node.get("scheduling", {}).get("onHostMaintenance") == ("TERMINATE" if has_gpus else None)
        assert node.get("scheduling", {}).get("preemptible", False) == (kind == "gpu_spot")
        assert settings["resources"].get("GPU", 0) == (8 if has_gpus else 0)
        for disk in node["disks"]:
            assert disk["initializeParams"].get("diskType", f"zones/{zone}/").startswith(f"zones/{zone}/")
        if has_gpus:
            assert node["machineType"] == "a2-highgpu-8g"
            assert node["disks"][0]["initializeParams"]["diskSizeGb"] >= 200
        if kind != "head":  # Ray gives the head an account of its own
            [account] = node["serviceAccounts"]
            assert account["email"].endswith("iam.gserviceaccount.com")
            assert account["scopes"] == ["https://www.googleapis.com/auth/cloud-platform"]
