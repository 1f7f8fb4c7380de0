"""The machines for `ray up`, checked by Ray's own schema, and what the stages need of them; nothing is started."""

import copy
import re
import shlex
from pathlib import Path

import pytest
import yaml
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from deploy.jobs.job_file import read_job_file
from deploy.spot_notice import parse_arguments
from tests.support.aws import understand_aws

REPOSITORY = Path(__file__).parents[2]
CLOUDS = ("ray_cluster.yaml", "deploy/clusters/gcp.yaml")
LOCAL = "deploy/clusters/local.yaml"
ALL = (*CLOUDS, LOCAL)


def text_of(name: str) -> str:
    return (REPOSITORY / name).read_text()


def prepared(text: str) -> dict:
    config = prepare_config(copy.deepcopy(yaml.safe_load(text)))
    validate_config(config)
    return config


def with_efa(text: str) -> str:
    """The file with what it only suggests for EFA."""
    return re.sub(r"^#efa", "    ", text, flags=re.MULTILINE)


def start_options(commands: list[str]) -> list[str]:
    [start] = [command for command in commands if "ray start" in command]
    return shlex.split(start[start.index("ray start") :])


@pytest.mark.parametrize("name", ALL)
def test_rays_own_schema_takes_every_cluster(name):
    config = prepared(text_of(name))
    assert config["max_workers"] >= sum(kind["min_workers"] for kind in config["available_node_types"].values())


def test_a_misspelt_key_of_a_cluster_would_be_noticed():
    with pytest.raises(Exception, match="idle_timeout_minuets"):
        prepared(text_of("ray_cluster.yaml").replace("idle_timeout_minutes", "idle_timeout_minuets"))


def test_what_is_suggested_for_efa_is_valid_too():
    plain, fast = (prepared(text) for text in (text_of("ray_cluster.yaml"), with_efa(text_of("ray_cluster.yaml"))))
    for kind in ("gpu", "gpu_spot"):
        assert "NetworkInterfaces" not in plain["available_node_types"][kind]["node_config"]
        interfaces = fast["available_node_types"][kind]["node_config"]["NetworkInterfaces"]
        assert {card["InterfaceType"] for card in interfaces} == {"efa"}
        options = fast["available_node_types"][kind]["docker"]["worker_run_options"]
        assert "--device=/dev/infiniband" in options
        assert "--device=/dev/infiniband" not in plain["available_node_types"][kind]["docker"]["worker_run_options"]


@pytest.mark.parametrize("name", CLOUDS)
def test_a_cloud_has_a_head_without_tasks_gpus_of_both_prices_and_cpus_and_scales_from_nothing(name):
    kinds = yaml.safe_load(text_of(name))["available_node_types"]
    assert set(kinds) == {"head", "gpu", "gpu_spot", "cpu"}
    assert kinds["head"]["resources"]["CPU"] == 0
    assert kinds["head"]["max_workers"] == 0
    for kind in ("gpu", "gpu_spot", "cpu"):
        assert (kinds[kind]["min_workers"], kinds[kind]["max_workers"] > 0) == (0, True)
    spot, plain = (yaml.safe_dump(kinds[kind]["node_config"]) for kind in ("gpu_spot", "gpu"))
    assert re.search("spot|preemptible", spot)
    assert not re.search("spot|preemptible", plain)
    assert not re.search("spot|preemptible", yaml.safe_dump(kinds["head"]))  # a job goes with its driver
    assert kinds["gpu_spot"]["priority"] > kinds["gpu"].get("priority", 0)
    assert len(kinds["gpu"]["docker"]["worker_run_options"]) >= 4
    config = yaml.safe_load(text_of(name))
    assert config["upscaling_speed"] >= kinds["gpu"]["max_workers"]  # or a training waits for them in several turns
    assert 5 <= config["idle_timeout_minutes"] <= 30  # a job that follows another finds its machines; forgotten ones go
    assert (
        config["provider"].get("cache_stopped_nodes", False) is False
    )  # a stopped one costs its disk, and keeps its latents


@pytest.mark.parametrize("name", ALL)
def test_every_machine_runs_the_same_image_and_knows_where_mlflow_is(name):
    docker = yaml.safe_load(text_of(name))["docker"]
    assert not {"head_image", "worker_image"} & set(docker)
    assert "worker_image" not in text_of(name)
    options = "\n".join(docker["run_options"])
    assert "MLFLOW_TRACKING_URI=http" in options
    assert "--volume /mnt/shared:/mnt/shared" in options
    assert re.search(r"image: \S+  +# CHANGE", text_of(name))


@pytest.mark.parametrize("name", ALL)
def test_nobody_reaches_a_dashboard_from_outside_and_every_node_wants_the_token(name):
    config = yaml.safe_load(text_of(name))
    # Ray's own commands for AWS and Google Cloud open the dashboard, which executes code, to every interface.
    assert "--dashboard-host=127.0.0.1" in start_options(config["head_start_ray_commands"])
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


@pytest.mark.parametrize("name", ALL)
def test_no_secret_stands_in_a_cluster_file(name):
    assert not re.search(r"(SECRET|ACCESS_KEY|PASSWORD|TOKEN)\w*\s*[=:]\s*\S", text_of(name))


@pytest.mark.parametrize("name", CLOUDS)
def test_jobs_ask_for_labels_that_machines_of_the_cluster_have(name):
    kinds = yaml.safe_load(text_of(name))["available_node_types"]
    labels = [kind["labels"] for kind in kinds.values()]
    for given in labels:
        validate_node_label_syntax(given)
    for path in sorted((REPOSITORY / "deploy" / "jobs").glob("*.yaml")):
        asked = read_job_file(path).entrypoint_label_selector
        assert any(asked.items() <= given.items() for given in labels), path


def test_jobs_ask_for_labels_that_machines_at_hand_are_started_with():
    config = yaml.safe_load(text_of(LOCAL))
    given = [
        dict(option.removeprefix("--labels=").split("=") for option in start_options(commands) if "--labels=" in option)
        for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"])
    ]
    for labels in given:
        validate_node_label_syntax(labels)
    for path in sorted((REPOSITORY / "deploy" / "jobs").glob("*.yaml")):
        asked = read_job_file(path).entrypoint_label_selector
        assert any(asked.items() <= labels.items() for labels in given), path


@pytest.mark.parametrize("name", ALL)
def test_start_commands_are_understood_by_rays_own_command_line(name):
    config = prepared(text_of(name))
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        words = start_options(commands)
        start.make_context("ray start", words[2:])


@pytest.mark.parametrize("name", CLOUDS)
def test_every_worker_of_a_cloud_listens_for_the_notice_that_it_goes_and_tells_the_head_that_it_joined(name):
    config = prepared(text_of(name))
    [listening] = [command for command in config["worker_start_ray_commands"] if "spot_notice" in command]
    command, redirection = listening.split(" > ")
    detached, *module = shlex.split(command)[:4]
    assert (detached, module) == ("setsid", ["python", "-m", "deploy.spot_notice"])
    assert redirection.endswith("2>&1 < /dev/null &")  # or it would end with the shell that starts it
    job = parse_arguments(shlex.split(command)[4:])
    assert job.cloud == config["provider"]["type"]
    assert f"--address={job.address}" in start_options(config["worker_start_ray_commands"])
    assert not any("spot_notice" in command for command in config["head_start_ray_commands"])


@pytest.mark.parametrize("name", CLOUDS)
def test_folders_that_containers_mount_are_made_on_every_machine(name):
    config = yaml.safe_load(text_of(name))
    mounted = [
        option.split()[1].split(":")[0] for option in config["docker"]["run_options"] if option.startswith("--volume")
    ]
    assert len(mounted) == 2
    own = [
        kind["initialization_commands"]
        for kind in config["available_node_types"].values()
        if "initialization_commands" in kind
    ]
    for commands in (config["initialization_commands"], *own):
        for folder in mounted:
            assert any(f"mkdir -p {folder}" in command or f" {folder} " in command for command in commands), folder
        for command in commands:
            assert shlex.split(command)


def test_gpus_of_google_cloud_have_their_driver_before_the_container_starts():
    config = yaml.safe_load(text_of("deploy/clusters/gcp.yaml"))
    for kind, settings in config["available_node_types"].items():
        has_gpus = kind.startswith("gpu")
        items = settings["node_config"].get("metadata", {}).get("items", [])
        assert ({"key": "install-nvidia-driver", "value": "True"} in items) == has_gpus
        assert settings["node_config"].get("scheduling", {}).get("onHostMaintenance") == (
            "TERMINATE" if has_gpus else None
        )
        assert settings["resources"].get("GPU", 0) == (8 if has_gpus else 0)
        commands = settings.get("initialization_commands", config["initialization_commands"])
        assert ("nvidia-smi" in commands[0]) == has_gpus  # Ray looks for it when it starts the container
        zone = config["provider"]["availability_zone"]
        assert all(
            disk["initializeParams"].get("diskType", f"zones/{zone}/").startswith(f"zones/{zone}/")
            for disk in settings["node_config"]["disks"]
        )


@pytest.mark.parametrize("name", CLOUDS)
def test_machines_may_pull_from_the_clouds_own_registry(name):
    config = yaml.safe_load(text_of(name))
    region = config["provider"]["region"]
    for settings in config["available_node_types"].values():
        commands = settings.get("initialization_commands", config["initialization_commands"])
        [login] = [command for command in commands if "docker login" in command or "configure-docker" in command]
        assert region in login or "REGISTRY-HOST" in login
        if name == "ray_cluster.yaml":
            words = shlex.split(login)
            asked = understand_aws(words[1 : words.index("|")])
            assert asked is not None
            assert asked.operation == "GetAuthorizationToken"
    assert "project_id" in config["provider"] or config["provider"]["type"] != "gcp"  # Ray's schema does not ask for it


def container_options(config: dict, kind: str) -> list[str]:
    """What Docker is told on a worker of a kind."""
    own = config.get("available_node_types", {}).get(kind, {}).get("docker", {})
    return config["docker"]["run_options"] + own.get("worker_run_options", [])


@pytest.mark.parametrize("name", ALL)
def test_containers_of_gpu_machines_have_what_training_needs(name):
    config = yaml.safe_load(text_of(name))
    assert config["docker"]["pull_before_run"] is True  # or a machine at hand goes on with an older image of the tag
    for kind in ("gpu", "gpu_spot"):
        options = container_options(config, kind)
        assert {"--ulimit nofile=65536:65536", "--ulimit memlock=-1:-1"} <= set(options)
        variables = dict(
            option.removeprefix("--env ").split("=", 1) for option in options if option.startswith("--env")
        )
        assert variables["NCCL_SOCKET_IFNAME"] == "^lo,docker"
        assert int(variables["TORCH_FR_BUFFER_SIZE"]) > 0
        assert variables["HF_HOME"].startswith("/mnt/shared/")  # once for all machines
        mounts = dict(
            option.removeprefix("--volume ").split(":")[:2] for option in options if option.startswith("--vol")
        )
        train = shlex.split(read_job_file(REPOSITORY / "deploy/jobs/train.yaml").entrypoint)
        cache = train[train.index("--cache-dir") + 1]
        assert mounts["/mnt/local"] == str(Path(cache).parent)  # the copy of the latents lies on the machine's own disk
        evaluate = shlex.split(read_job_file(REPOSITORY / "deploy/jobs/evaluate.yaml").entrypoint)
        assert evaluate[evaluate.index("--output") + 1].startswith(mounts["/mnt/shared"] + "/")


@pytest.mark.parametrize("name", ALL)
def test_workers_join_the_head_and_the_head_scales(name):
    config = prepared(text_of(name))
    head, worker = (start_options(config[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    [port] = [option.removeprefix("--port=") for option in head if option.startswith("--port=")]
    assert f"--address=$RAY_HEAD_IP:{port}" in worker
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head  # where Ray puts it
    assert config["auth"]["ssh_user"] == "ubuntu"  # of the images that the files name


def test_the_head_of_machines_at_hand_takes_no_tasks():
    config = yaml.safe_load(text_of(LOCAL))
    assert {"--num-cpus=0", "--num-gpus=0"} <= set(start_options(config["head_start_ray_commands"]))


def test_aws_machines_have_the_disks_and_the_network_that_the_runbook_says():
    config = yaml.safe_load(with_efa(text_of("ray_cluster.yaml")))
    kinds = config["available_node_types"]
    for kind in ("gpu", "gpu_spot"):
        node = kinds[kind]["node_config"]
        assert node["InstanceType"] == "p4d.24xlarge"
        # One card after the other; the first is the machine's own interface. Source: AWS's page on several network cards.
        cards = [(card["NetworkCardIndex"], card["DeviceIndex"]) for card in node["NetworkInterfaces"]]
        assert cards == [(0, 0), (1, 1), (2, 1), (3, 1)]
        options = kinds[kind]["docker"]["worker_run_options"]
        assert {"--volume /opt/amazon:/opt/amazon:ro", "--env FI_PROVIDER=efa"} <= set(options)
        [disk] = [command for command in kinds[kind]["initialization_commands"] if "/mnt/local" in command]
        assert "mount --bind /opt/dlami/nvme /mnt/local" in disk
    for settings in kinds.values():
        [disk] = settings["node_config"]["BlockDeviceMappings"]
        assert disk["Ebs"]["VolumeSize"] >= 150  # the image, its layers, and a checkpoint under way
    assert "GPU" not in kinds["cpu"]["resources"]
    assert not kinds["cpu"]["node_config"]["InstanceType"].startswith(("p", "g"))


def test_google_machines_read_the_bucket_by_an_account_and_have_room_for_the_latents():
    kinds = yaml.safe_load(text_of("deploy/clusters/gcp.yaml"))["available_node_types"]
    for kind in ("gpu", "gpu_spot", "cpu"):
        node = kinds[kind]["node_config"]
        [account] = node["serviceAccounts"]
        assert account["email"].endswith("iam.gserviceaccount.com")
        assert account["scopes"] == ["https://www.googleapis.com/auth/cloud-platform"]
        if kind != "cpu":
            assert node["machineType"] == "a2-highgpu-8g"
            assert node["disks"][0]["initializeParams"]["diskSizeGb"] >= 200
    assert kinds["gpu_spot"]["node_config"]["scheduling"]["preemptible"] is True
