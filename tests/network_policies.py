"""NetworkPolicies as a network that enforces them has it: who reaches whom."""

from collections.abc import Mapping
from ipaddress import ip_address, ip_network

from manifests import Manifest, pods


def connects(
    documents: list[Manifest],
    source: Mapping[str, str],
    target: Mapping[str, str] | str,
    port: int | str,
) -> bool:
    """Whether NetworkPolicies let a pod of these labels reach another, or an address, at a port."""
    policies = [d["spec"] for d in documents if d["kind"] == "NetworkPolicy"]
    ports = {p.get("name"): p["containerPort"] for pod in pods(documents) for c in pod.containers
             for p in c.get("ports", [])}  # fmt: skip

    def opened(way: str, own: Mapping[str, str], peer: Mapping[str, str] | str) -> bool:
        direction = "Egress" if way == "to" else "Ingress"
        selected = [p for p in policies if direction in p["policyTypes"] and selects(p["podSelector"], own)]
        rules = [rule for policy in selected for rule in policy.get(direction.lower(), [])]
        return not selected or any(
            any(admits(each, peer) for each in rule[way])
            and ("ports" not in rule or port in [ports.get(p["port"], p["port"]) for p in rule["ports"]])
            for rule in rules
        )

    return opened("to", source, target) and (isinstance(target, str) or opened("from", target, source))


def selects(selector: Manifest, labels: Mapping[str, str]) -> bool:
    expressions = selector.get("matchExpressions", [])
    assert all(expression["operator"] == "NotIn" for expression in expressions)
    return selector.get("matchLabels", {}).items() <= dict(labels).items() and not any(
        labels.get(expression["key"]) in expression["values"] for expression in expressions
    )


def admits(peer: Manifest, other: Mapping[str, str] | str) -> bool:
    if "ipBlock" in peer:
        network = ip_network(peer["ipBlock"]["cidr"])
        return isinstance(other, str) and ip_address(other) in network
    return not isinstance(other, str) and "podSelector" in peer and selects(peer["podSelector"], other)
