"""Runs the runbook's commands for a new AWS account, and then Ray's cluster launcher, against moto."""

import copy
import re

import boto3
import jmespath
import pytest
import yaml
from moto import mock_aws

from tests.deploy.test_clusters import prepared, with_efa
from tests.support.aws import parse_aws, words_of
from tests.support.readme import commands, text_of

ACCOUNT, REGION = "123456789012", "us-west-2"
NOT_IN_MOTO = {"RequestServiceQuotaIncrease", "GetParameter", "CreatePlacementGroup"}


def runbook() -> list[str]:
    return commands("runbook", "docs/how-to/aws.md")


@pytest.fixture(scope="module")
def account(tmp_path_factory):
    """Runs the runbook's AWS commands; yields {shell variable: value}."""
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        for name, value in {
            "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": REGION,
            "HOME": str(tmp_path_factory.mktemp("home")),
        }.items():  # fmt: skip
            patch.setenv(name, value)
        variables: dict[str, str] = {}
        for line in runbook():
            # Skips other programs, the login that is piped to docker, and `aws s3`, which sends several requests.
            if not re.match(r"(\w+=\$\()?aws ", line) or " | docker" in line or line.startswith("aws s3 "):
                continue
            for placeholder, value in (("YOUR-ADDRESS", "192.0.2.7"), ("BUCKET", "a-bucket"), ("ACCOUNT", ACCOUNT)):
                line = line.replace(placeholder, value)
            name, words = words_of(line, variables)
            call = parse_aws(words[1:])
            if call.operation in NOT_IN_MOTO:
                continue
            client = boto3.client(call.service, REGION)
            methods = client.meta.method_to_api_mapping  # {boto3's method: AWS's operation}
            method = next(method for method, operation in methods.items() if operation == call.operation)
            answer = getattr(client, method)(**call.parameters)
            if name is not None:
                variables[name] = jmespath.search(call.query, answer)
        yield variables


def launched(text, account, monkeypatch):
    """Fills in the placeholders of a cluster file and launches one node of each type.

    Returns {node type: (its resources, EC2's description of the instance)}.
    """
    from ray.autoscaler._private.aws import config as launcher
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    monkeypatch.setattr(launcher.time, "sleep", lambda seconds: None)
    image = boto3.client("ec2").describe_images()["Images"][0]["ImageId"]
    for placeholder, value in (
        ("ami-CHANGE", image), ("sg-CHANGE", account["GROUP"]), ("subnet-CHANGE", account["SUBNET"]),
        ("ACCOUNT", ACCOUNT), ("EFS", account["FILES"]),
    ):  # fmt: skip
        text = text.replace(placeholder, value)
    config = AWSNodeProvider.fillout_available_node_types_resources(launcher.bootstrap_aws(prepared(text)))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    answers = {}
    for kind, settings in config["available_node_types"].items():
        [machine] = provider.create_node(copy.deepcopy(settings["node_config"]), {}, 1).values()
        answers[kind] = (settings["resources"], boto3.client("ec2").describe_instances(InstanceIds=[machine.id]))
    return {kind: (resources, found["Reservations"][0]["Instances"][0]) for kind, (resources, found) in answers.items()}


def groups_of(machine):
    return {group["GroupId"] for interface in machine["NetworkInterfaces"] for group in interface["Groups"]}


@pytest.mark.soak
@pytest.mark.parametrize("efa", [False, True], ids=["plain", "efa"])
def test_machines_start_in_the_runbooks_group_and_subnet_with_its_roles(account, monkeypatch, efa):
    text = text_of("ray_cluster.yaml")
    machines = launched(with_efa(text) if efa else text, account, monkeypatch)
    for kind, (resources, machine) in machines.items():
        assert groups_of(machine) == {account["GROUP"]}, kind  # otherwise workers cannot reach the head
        assert {interface["SubnetId"] for interface in machine["NetworkInterfaces"]} == {account["SUBNET"]}
        role = machine["IamInstanceProfile"]["Arn"].split("/")[-1]
        assert role == ("meanflow-head" if kind == "head" else "meanflow")
        assert resources.get("GPU", 0) == (8 if kind.startswith("gpu") else 0)
        assert (resources["CPU"] > 0) == (kind != "head")


@pytest.mark.soak
def test_security_group_admits_only_its_members_and_ssh_from_your_address(account):
    [group] = boto3.client("ec2").describe_security_groups(GroupIds=[account["GROUP"]])["SecurityGroups"]
    # "-1", all protocols, sorts before "tcp".
    inside, ssh = sorted(group["IpPermissions"], key=lambda rule: rule["IpProtocol"])
    assert (inside["IpProtocol"], [pair["GroupId"] for pair in inside["UserIdGroupPairs"]]) == (
        "-1",
        [account["GROUP"]],
    )
    assert inside["IpRanges"] == []
    assert (ssh["FromPort"], ssh["ToPort"], [found["CidrIp"] for found in ssh["IpRanges"]]) == (
        22,
        22,
        ["192.0.2.7/32"],
    )
    assert any(rule["UserIdGroupPairs"] for rule in group["IpPermissionsEgress"])  # required by EFA


@pytest.mark.soak
def test_shared_storage_has_a_mount_target_in_the_clusters_zone_and_group(account):
    client = boto3.client("efs")
    [target] = client.describe_mount_targets(FileSystemId=account["FILES"])["MountTargets"]
    assert target["SubnetId"] == account["SUBNET"]
    groups = client.describe_mount_target_security_groups(MountTargetId=target["MountTargetId"])["SecurityGroups"]
    assert groups == [account["GROUP"]]
    zone = yaml.safe_load(text_of("ray_cluster.yaml"))["provider"]["availability_zone"]
    assert target["AvailabilityZoneName"] == zone


@pytest.mark.soak
def test_only_the_head_may_launch_instances_with_the_workers_role(account):
    client = boto3.client("iam")

    def as_list(value: str | list[str]) -> list[str]:
        return [value] if isinstance(value, str) else value

    allowed = {}
    for role in ("meanflow", "meanflow-head"):
        policy = client.get_role_policy(RoleName=role, PolicyName="stages")["PolicyDocument"]
        allowed[role] = {
            (action, resource)
            for statement in policy["Statement"]
            for action in as_list(statement["Action"])
            for resource in as_list(statement["Resource"])
        }
    assert allowed["meanflow"] < allowed["meanflow-head"]
    more = allowed["meanflow-head"] - allowed["meanflow"]
    assert more == {("ec2:*", "*"), ("iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/meanflow")}
    assert {("s3:*", "arn:aws:s3:::a-bucket"), ("s3:*", "arn:aws:s3:::a-bucket/*")} < allowed["meanflow"]
    assert ("ecr:GetAuthorizationToken", "*") in allowed["meanflow"]
    profile = client.get_instance_profile(InstanceProfileName="meanflow")["InstanceProfile"]
    assert [role["RoleName"] for role in profile["Roles"]] == ["meanflow"]


def calls(name):
    """The parameters of each use of an AWS command in the runbook."""
    return [parse_aws(words_of(line, {})[1][1:]).parameters for line in runbook() if f" {name} " in line]


def test_quotas_and_placement_group_fit_the_largest_cluster():
    config = yaml.safe_load(with_efa(text_of("ray_cluster.yaml")))
    gpu = config["available_node_types"]["gpu"]
    # A p4d.24xlarge has 96 vCPUs.
    quotas = calls("request-service-quota-increase")
    assert {quota["DesiredValue"] for quota in quotas} == {96 * gpu["max_workers"]}
    assert config["max_workers"] >= gpu["max_workers"] == config["available_node_types"]["gpu_spot"]["max_workers"]
    [placement] = calls("create-placement-group")
    assert placement == {"GroupName": gpu["node_config"]["Placement"]["GroupName"], "Strategy": "cluster"}


def test_runbook_creates_the_service_linked_role_for_spot_instances():
    # A new account lacks this role, and the head is not allowed to create it.
    assert calls("create-service-linked-role") == [{"AWSServiceName": "spot.amazonaws.com"}]
