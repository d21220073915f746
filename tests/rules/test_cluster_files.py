"""The cluster files as shipped: valid by Ray's own schema, with the doors shut."""

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RAY = "2.60.0"


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture
def kuberay() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "jobs" / "kuberay.yaml").read_text())


def test_ray_accepts_the_cluster_file(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(cluster)
    config.setdefault("cluster_synced_files", [])
    validate_config(config)
    config["max_wrokers"] = 3
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(config)


def test_workers_come_from_nothing_with_spot_first(cluster: dict[str, Any]) -> None:
    types = {name: kind for name, kind in cluster["available_node_types"].items() if name != cluster["head_node_type"]}
    assert all(kind["min_workers"] == 0 for kind in types.values())
    for card in ("a100_40gb", "a10g"):
        spot, sure = types[f"{card}_spot"], types[card]
        assert spot["resources"] == sure["resources"]
        assert spot["priority"] > sure["priority"]
        assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert "InstanceMarketOptions" not in sure["node_config"]
    assert "GPU" not in types["cpu"]["resources"]
    assert cluster["available_node_types"]["head"]["resources"] == {"CPU": 0}


def test_the_doors_of_the_cluster_are_shut(cluster: dict[str, Any]) -> None:
    starts = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
    assert sum("ray start" in line for line in starts) == 2
    head = next(line for line in starts if "--head" in line)
    assert "--dashboard-host=127.0.0.1" in head
    assert "ray-client-server-port" not in head
    rules = cluster["provider"]["security_group"]["IpPermissions"]
    assert [rule["FromPort"] for rule in rules] == [22]
    assert not any("0.0.0.0/0" in str(rule) for rule in rules)
    for kind in cluster["available_node_types"].values():
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in kind["node_config"]["BlockDeviceMappings"])
    assert any("chmod 600" in line and "auth_token" in line for line in cluster["setup_commands"])


def test_versions_are_those_of_the_constraints(cluster: dict[str, Any], kuberay: dict[str, Any]) -> None:
    assert f"ray=={RAY}" in (ROOT / "constraints.txt").read_text()
    assert cluster["docker"]["image"] == f"rayproject/ray:{RAY}-py311-gpu"
    assert kuberay["spec"]["rayClusterSpec"]["rayVersion"] == RAY


def test_the_kubernetes_job_names_fields_that_the_operator_knows(kuberay: dict[str, Any]) -> None:
    """KubeRay's RayJob (ray.io/v1), by its API reference."""
    assert (kuberay["apiVersion"], kuberay["kind"]) == ("ray.io/v1", "RayJob")
    spec, cluster = kuberay["spec"], kuberay["spec"]["rayClusterSpec"]
    known = {"submissionMode", "entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"}
    assert set(spec) <= known | {"runtimeEnvYAML", "rayClusterSpec", "activeDeadlineSeconds", "suspend"}
    assert set(cluster) <= {
        *("rayVersion", "enableInTreeAutoscaling", "authOptions", "headGroupSpec", "workerGroupSpecs"),
    }
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert set(group) == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
        assert group["minReplicas"] == 0
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        for container in group["template"]["spec"]["containers"]:
            assert container["resources"]["limits"] == container["resources"]["requests"]
            assert "env" not in container, "tokens come from a Secret"
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
