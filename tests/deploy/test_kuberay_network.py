"""The network policies of deploy/kuberay: which connections they allow, added up as Kubernetes does."""

import ipaddress
from dataclasses import dataclass, field

import pytest

from tests.support.kubernetes import KUBERAY, STAGES, of_kind, pods, render


@dataclass(frozen=True)
class Place:
    """A pod, by what policies see of it."""

    namespace: str
    labels: dict[str, str] = field(default_factory=dict)


OPERATOR = Place("kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"})
STRANGER = Place("default")
INGRESS = Place("ingress-nginx")
PROMETHEUS = Place("monitoring")
DNS = Place("kube-system", {"k8s-app": "kube-dns"})


@pytest.fixture(scope="module")
def manifests() -> list[dict]:
    """The base's documents; no overlay changes these parts."""
    return render(KUBERAY / "base")


def places(documents: list[dict]) -> dict[str, Place]:
    return {pod.name: Place(pod.namespace, pod.labels) for pod in pods(documents)}


def is_allowed(policies: list[dict], source: Place, target: Place, port: int) -> bool:
    """Whether a connection is let out at the source and in at the target."""
    return _passes(policies, source, target, port, "Egress") and _passes(policies, target, source, port, "Ingress")


def _passes(policies: list[dict], own: Place, other: Place, port: int, direction: str) -> bool:
    chosen = [
        policy["spec"]
        for policy in policies
        if policy["metadata"]["namespace"] == own.namespace
        and _selects(policy["spec"]["podSelector"], own.labels)
        and direction in policy["spec"]["policyTypes"]
    ]
    peers = "from" if direction == "Ingress" else "to"
    rules = [rule for spec in chosen for rule in spec.get(direction.lower(), [])]
    return not chosen or any(
        ("ports" not in rule or port in [one["port"] for one in rule["ports"]])
        and (peers not in rule or any(_is_peer(peer, own, other) for peer in rule[peers]))
        for rule in rules
    )


def _is_peer(peer: dict, own: Place, other: Place) -> bool:
    if "ipBlock" in peer:
        return False  # every block excludes the private addresses that pods have
    if "namespaceSelector" in peer:
        namespace = _selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace})
    else:
        namespace = other.namespace == own.namespace
    return namespace and _selects(peer.get("podSelector", {}), other.labels)


def _selects(selector: dict, labels: dict[str, str]) -> bool:
    """Every label and every expression must hold; an empty selector takes all."""
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        (labels.get(one["key"]) in one["values"]) == (one["operator"] == "In")
        for one in selector.get("matchExpressions", [])
    )


def test_policies_allow_what_the_stages_need(manifests):
    policies, at = of_kind(manifests, "NetworkPolicy"), places(manifests)
    needed = [
        (OPERATOR, at["serve head"], 8000),
        (INGRESS, at["serve gpu"], 8000),
        (at["mlflow"], at["mlflow-postgres"], 5432),
        (at["mlflow"], DNS, 53),
    ]
    for stage in STAGES:
        head, gpu = at[f"{stage} head"], at[f"{stage} gpu"]
        needed += [(head, gpu, 23456), (gpu, head, 23456), (gpu, gpu, 23456), (OPERATOR, head, 8265)]
        needed += [(gpu, at["mlflow"], 5000), (head, at["mlflow"], 5000), (gpu, DNS, 53), (PROMETHEUS, gpu, 8080)]
        if stage != "serve":
            submitter = at[f"{stage} submitter"]
            needed += [(submitter, head, 8265), (submitter, DNS, 53)]
    for source, target, port in needed:
        assert is_allowed(policies, source, target, port), (source, target, port)


def test_policies_refuse_everything_else(manifests):
    policies, at = of_kind(manifests, "NetworkPolicy"), places(manifests)
    refused = [(at["train gpu"], STRANGER, 443)]
    for stage in STAGES:
        for target in (at[f"{stage} head"], at[f"{stage} gpu"]):
            for port in (8265, 6379, 10001, 52365, 8000, 23456):
                sources = [STRANGER, at["shell"], at["mlflow"]]
                if (stage, port) != ("serve", 8000):
                    sources.append(INGRESS)
                if stage != "serve":  # the endpoint answers strangers, so it reaches no training
                    sources.append(at["serve gpu"])
                refused += [(source, target, port) for source in sources]
    for source in (STRANGER, INGRESS, at["shell"], at["encode submitter"], Place("mlflow")):
        refused.append((source, at["mlflow"], 5000))
    for source in (STRANGER, at["train gpu"], at["serve gpu"], Place("mlflow")):
        refused.append((source, at["mlflow-postgres"], 5432))
    for source in (STRANGER, INGRESS, at["train gpu"], at["serve gpu"]):
        refused += [(source, at["shell"], 8000), (source, at["train submitter"], 8000)]
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
