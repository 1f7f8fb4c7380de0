"""The runbook's commands for a fresh account, run against a stand-in for AWS, and Ray's own launcher on what they made."""

import copy
import re

import boto3
import jmespath
import pytest
import yaml
from moto import mock_aws

from tests.deploy.test_clusters import prepared, text_of, with_efa
from tests.support.aws import understand_aws, words_of
from tests.test_docs import commands

ACCOUNT, REGION = "123456789012", "us-west-2"
# What the stand-in does not have: quotas, the newest machine image, placement groups.
NOT_RUN = {"RequestServiceQuotaIncrease", "GetParameter", "CreatePlacementGroup"}


@pytest.fixture(scope="module")
def account(tmp_path_factory):
    """{variable: value} of the runbook's shell, once all its commands for AWS have run."""
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        for name, value in {
            "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": REGION,
            "HOME": str(tmp_path_factory.mktemp("home")),
        }.items():  # fmt: skip
            patch.setenv(name, value)
        variables: dict[str, str] = {}
        for line in commands("runbook"):
            if not re.match(r"(\w+=\$\()?aws ", line) or " | docker" in line or line.startswith("aws s3 "):
                continue
            for ours, theirs in (("YOUR-ADDRESS", "192.0.2.7"), ("BUCKET", "a-bucket"), ("ACCOUNT", ACCOUNT)):
                line = line.replace(ours, theirs)
            name, words = words_of(line, variables)
            call = understand_aws(words[1:])
            if call.operation in NOT_RUN:
                continue
            client = boto3.client(call.service, REGION)
            method = next(method for method, of in client.meta.method_to_api_mapping.items() if of == call.operation)
            answer = getattr(client, method)(**call.parameters)
            if name is not None:
                variables[name] = jmespath.search(call.query, answer)
        yield variables


def launched(text, account, monkeypatch):
    """{kind: what EC2 says of a machine of it}, as Ray's launcher makes it of a cluster file that is filled in."""
    from ray.autoscaler._private.aws import config as launcher
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    monkeypatch.setattr(launcher.time, "sleep", lambda seconds: None)
    image = boto3.client("ec2").describe_images()["Images"][0]["ImageId"]
    for ours, theirs in (
        ("ami-CHANGE", image), ("sg-CHANGE", account["GROUP"]), ("subnet-CHANGE", account["SUBNET"]),
        ("ACCOUNT", ACCOUNT), ("EFS", account["FILES"]),
    ):  # fmt: skip
        text = text.replace(ours, theirs)
    config = AWSNodeProvider.fillout_available_node_types_resources(launcher.bootstrap_aws(prepared(text)))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    made = {}
    for kind, settings in config["available_node_types"].items():
        [machine] = provider.create_node(copy.deepcopy(settings["node_config"]), {}, 1).values()
        made[kind] = (settings["resources"], boto3.client("ec2").describe_instances(InstanceIds=[machine.id]))
    return {kind: (resources, seen["Reservations"][0]["Instances"][0]) for kind, (resources, seen) in made.items()}


def groups_of(machine):
    return {group["GroupId"] for card in machine["NetworkInterfaces"] for group in card["Groups"]}


@pytest.mark.parametrize("efa", [False, True], ids=["plain", "efa"])
def test_all_machines_are_in_the_runbooks_group_and_zone_with_the_roles_of_the_account(account, monkeypatch, efa):
    text = text_of("ray_cluster.yaml")
    machines = launched(with_efa(text) if efa else text, account, monkeypatch)
    for kind, (resources, machine) in machines.items():
        assert groups_of(machine) == {account["GROUP"]}, kind  # or workers could not reach the head
        assert {card["SubnetId"] for card in machine["NetworkInterfaces"]} == {account["SUBNET"]}
        role = machine["IamInstanceProfile"]["Arn"].split("/")[-1]
        assert role == ("meanflow-head" if kind == "head" else "meanflow")
        assert resources.get("GPU", 0) == (8 if kind.startswith("gpu") else 0)
        assert (resources["CPU"] > 0) == (kind != "head")


def test_the_group_lets_in_itself_and_your_ssh_alone(account):
    [group] = boto3.client("ec2").describe_security_groups(GroupIds=[account["GROUP"]])["SecurityGroups"]
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
    assert any(rule["UserIdGroupPairs"] for rule in group["IpPermissionsEgress"])  # EFA wants it said


def test_shared_storage_has_a_door_in_the_zone_and_the_group(account):
    client = boto3.client("efs")
    [target] = client.describe_mount_targets(FileSystemId=account["FILES"])["MountTargets"]
    assert target["SubnetId"] == account["SUBNET"]
    groups = client.describe_mount_target_security_groups(MountTargetId=target["MountTargetId"])["SecurityGroups"]
    assert groups == [account["GROUP"]]
    zone = yaml.safe_load(text_of("ray_cluster.yaml"))["provider"]["availability_zone"]
    assert target["AvailabilityZoneName"] == zone


def test_the_head_may_hand_on_the_workers_role_and_workers_may_start_nothing(account):
    client = boto3.client("iam")
    allowed = {}
    for role in ("meanflow", "meanflow-head"):
        statements = client.get_role_policy(RoleName=role, PolicyName="stages")["PolicyDocument"]["Statement"]
        allowed[role] = {
            (action, resource)
            for statement in statements
            for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])
            for resource in (
                [statement["Resource"]] if isinstance(statement["Resource"], str) else statement["Resource"]
            )
        }
    assert allowed["meanflow"] < allowed["meanflow-head"]
    more = allowed["meanflow-head"] - allowed["meanflow"]
    assert more == {("ec2:*", "*"), ("iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/meanflow")}
    assert {("s3:*", "arn:aws:s3:::a-bucket"), ("s3:*", "arn:aws:s3:::a-bucket/*")} < allowed["meanflow"]
    assert ("ecr:GetAuthorizationToken", "*") in allowed["meanflow"]
    profile = client.get_instance_profile(InstanceProfileName="meanflow")["InstanceProfile"]
    assert [role["RoleName"] for role in profile["Roles"]] == ["meanflow"]


def calls(name):
    """Parameters of the runbook's calls of a command."""
    return [understand_aws(words_of(line, {})[1][1:]).parameters for line in commands("runbook") if f" {name} " in line]


def test_quotas_and_the_placement_group_fit_what_the_cluster_may_grow_to():
    config = yaml.safe_load(with_efa(text_of("ray_cluster.yaml")))
    gpu = config["available_node_types"]["gpu"]
    # A p4d.24xlarge has 96 vCPUs.
    quotas = calls("request-service-quota-increase")
    assert {quota["DesiredValue"] for quota in quotas} == {96 * gpu["max_workers"]}
    assert config["max_workers"] >= gpu["max_workers"] == config["available_node_types"]["gpu_spot"]["max_workers"]
    [placement] = calls("create-placement-group")
    assert placement == {"GroupName": gpu["node_config"]["Placement"]["GroupName"], "Strategy": "cluster"}


def test_the_account_may_have_spot_machines():
    # A new account lacks this role, and the head, which asks for the first spot machine, may not make it.
    assert calls("create-service-linked-role") == [{"AWSServiceName": "spot.amazonaws.com"}]
