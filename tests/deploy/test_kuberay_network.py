"""Connections that the network policies of deploy/kuberay allow, evaluated by Kubernetes' rules."""

import ipaddress
from dataclasses import dataclass, field

import pytest

from tests.support.kubernetes import KUBERAY, STAGES, of_kind, pods, render


@dataclass(frozen=True)
class Pod:
    """The parts of a pod that network policies match."""

    namespace: str
    labels: dict[str, str] = field(default_factory=dict)


OPERATOR = Pod("kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"})
UNRELATED = Pod("default")
INGRESS = Pod("ingress-nginx")
PROMETHEUS = Pod("monitoring")
DNS = Pod("kube-system", {"k8s-app": "kube-dns"})


@pytest.fixture(scope="module")
def manifests() -> list[dict]:
    """The manifests of the base. No overlay changes the network policies."""
    return render(KUBERAY / "base")


def pods_by_name(documents: list[dict]) -> dict[str, Pod]:
    return {pod.name: Pod(pod.namespace, pod.labels) for pod in pods(documents)}


def is_allowed(policies: list[dict], source: Pod, target: Pod, port: int) -> bool:
    """Whether the source's egress rules and the target's ingress rules both allow the connection."""
    return _passes(policies, source, target, port, "Egress") and _passes(policies, target, source, port, "Ingress")


def _passes(policies: list[dict], own: Pod, other: Pod, port: int, direction: str) -> bool:
    """Whether the policies of pod `own` allow the connection; a pod without policies allows everything."""
    selected = [
        policy["spec"]
        for policy in policies
        if policy["metadata"]["namespace"] == own.namespace
        and _selects(policy["spec"]["podSelector"], own.labels)
        and direction in policy["spec"]["policyTypes"]
    ]
    peers = "from" if direction == "Ingress" else "to"
    rules = [rule for spec in selected for rule in spec.get(direction.lower(), [])]
    return not selected or any(
        ("ports" not in rule or port in [one["port"] for one in rule["ports"]])
        and (peers not in rule or any(_is_peer(peer, own, other) for peer in rule[peers]))
        for rule in rules
    )


def _is_peer(peer: dict, own: Pod, other: Pod) -> bool:
    if "ipBlock" in peer:
        return False  # every block excludes private addresses, which pods have
    if "namespaceSelector" in peer:
        namespace = _selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace})
    else:
        namespace = other.namespace == own.namespace
    return namespace and _selects(peer.get("podSelector", {}), other.labels)


def _selects(selector: dict, labels: dict[str, str]) -> bool:
    """Whether all labels and expressions match; an empty selector matches every pod."""
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        (labels.get(one["key"]) in one["values"]) == (one["operator"] == "In")
        for one in selector.get("matchExpressions", [])
    )


def test_policies_allow_required_connections(manifests):
    policies, pod = of_kind(manifests, "NetworkPolicy"), pods_by_name(manifests)
    needed = [
        (OPERATOR, pod["serve head"], 8000),
        (INGRESS, pod["serve gpu"], 8000),
        (pod["mlflow"], pod["mlflow-postgres"], 5432),
        (pod["mlflow"], DNS, 53),
    ]
    for stage in STAGES:
        head, gpu = pod[f"{stage} head"], pod[f"{stage} gpu"]
        needed += [(head, gpu, 23456), (gpu, head, 23456), (gpu, gpu, 23456), (OPERATOR, head, 8265)]
        needed += [(gpu, pod["mlflow"], 5000), (head, pod["mlflow"], 5000), (gpu, DNS, 53), (PROMETHEUS, gpu, 8080)]
        if stage != "serve":
            submitter = pod[f"{stage} submitter"]
            needed += [(submitter, head, 8265), (submitter, DNS, 53)]
    for source, target, port in needed:
        assert is_allowed(policies, source, target, port), (source, target, port)


def test_policies_refuse_other_connections(manifests):
    policies, pod = of_kind(manifests, "NetworkPolicy"), pods_by_name(manifests)
    refused = [(pod["train gpu"], UNRELATED, 443)]
    for stage in STAGES:
        for target in (pod[f"{stage} head"], pod[f"{stage} gpu"]):
            for port in (8265, 6379, 10001, 52365, 8000, 23456):
                sources = [UNRELATED, pod["shell"], pod["mlflow"]]
                if (stage, port) != ("serve", 8000):
                    sources.append(INGRESS)
                if stage != "serve":  # the endpoint is exposed to clients, so it must not reach training pods
                    sources.append(pod["serve gpu"])
                refused += [(source, target, port) for source in sources]
    for source in (UNRELATED, INGRESS, pod["shell"], pod["encode submitter"], Pod("mlflow")):
        refused.append((source, pod["mlflow"], 5000))
    for source in (UNRELATED, pod["train gpu"], pod["serve gpu"], Pod("mlflow")):
        refused.append((source, pod["mlflow-postgres"], 5432))
    for source in (UNRELATED, INGRESS, pod["train gpu"], pod["serve gpu"]):
        refused += [(source, pod["shell"], 8000), (source, pod["train submitter"], 8000)]
    for source, target, port in refused:
        assert not is_allowed(policies, source, target, port), (source, target, port)


def test_traffic_to_the_internet_excludes_private_addresses(manifests):
    rules = [rule for policy in of_kind(manifests, "NetworkPolicy") for rule in policy["spec"].get("egress", [])]
    blocks = [peer["ipBlock"] for rule in rules for peer in rule.get("to", []) if "ipBlock" in peer]
    assert [block["cidr"] for block in blocks] == ["0.0.0.0/0"] * 2
    for block in blocks:
        for private in ("10.1.2.3", "172.20.0.1", "192.168.1.1", "169.254.169.254"):
            assert any(ipaddress.ip_address(private) in ipaddress.ip_network(cidr) for cidr in block["except"]), private
    to_anywhere = [rule for rule in rules if "to" not in rule or "ipBlock" in rule["to"][0]]
    ports = {tuple(port["port"] for port in rule["ports"]) for rule in to_anywhere}
    assert ports == {(443,), (443, 6443)}  # object stores and the model hub; the API server
