"""The configuration: what is read, and that every fault is named with what is legal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from blobspace.cluster import ClusterConfig, load_config
from blobspace.cluster.config import WorkspaceGroup, make_config, parse_size
from blobspace.ops.errors import InvalidInputError, NotFoundError

CONFIGS = Path(__file__).parent.parent / "configs"
LEAST: dict[str, Any] = {"workspaces": [{"name": "w0"}]}


def faults_of(value: Any) -> list[str]:
    with pytest.raises(InvalidInputError) as caught:
        make_config(value)
    faults = caught.value.fields["faults"]
    assert isinstance(faults, list)
    assert all(fault in str(caught.value) for fault in faults)
    return faults


# --- the three configurations that come along ------------------------------------------------------------------


def test_the_local_configuration_has_four_small_cpu_workspaces() -> None:
    config = load_config(CONFIGS / "local.yaml")
    assert config.name == "default"
    assert config.workspace_names() == ["w0", "w1", "w2", "w3"]
    assert config.group_of("w3").num_gpus == 0
    assert config.group_of("w3").memory_limit == 256 * 2**20


def test_the_multi_node_configuration_spreads_over_labelled_nodes() -> None:
    config = load_config(CONFIGS / "multi-node.yaml")
    assert config.workspace_names() == ["a0", "a1", "a2", "a3", "b0", "b1", "b2", "data"]
    assert config.group_of("a1").labels == {"zone": "a"}
    assert config.group_of("b2").labels == {"zone": "b"}
    assert config.group_of("data").resources == {"ssd": 0.5}
    assert all(group.memory_limit for group in config.workspaces)


def test_the_gpu_configuration_has_a_gpu_group_and_a_cpu_group() -> None:
    config = load_config(CONFIGS / "gpu.yaml")
    assert config.group_of("train1").num_gpus == 1
    assert config.group_of("feed0").num_gpus == 0


@pytest.mark.parametrize("name", ["local", "multi-node", "gpu"])
def test_a_configuration_goes_through_plain_values_and_yaml_unchanged(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert make_config(config.model_dump()) == config
    assert make_config(yaml.safe_load(yaml.safe_dump(config.model_dump()))) == config
    assert make_config(config) is config


def test_the_three_configurations_explain_every_key() -> None:
    texts = "\n".join(path.read_text(encoding="utf-8") for path in CONFIGS.glob("*.yaml"))
    keys = [*ClusterConfig.model_fields, *WorkspaceGroup.model_fields]
    assert [key for key in keys if f"{key}:" not in texts] == []


# --- faults ----------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_named_with_the_legal_ones() -> None:
    [fault] = faults_of({**LEAST, "workers": 4})
    assert fault.startswith("workers: unknown key")
    assert all(key in fault for key in ClusterConfig.model_fields)


def test_an_unknown_key_of_a_group_is_named_with_the_groups_legal_ones() -> None:
    [fault] = faults_of({"workspaces": [{"name": "w0"}, {"name": "w1", "gpus": 1}]})
    assert fault.startswith("workspaces.1.gpus: unknown key")
    assert all(key in fault for key in WorkspaceGroup.model_fields)
    assert "checkpoint_root" not in fault


def test_all_faults_are_listed_at_once() -> None:
    faults = faults_of(
        {
            "seed": -1,
            "checkpoint_deadline_s": 0,
            "colour": "red",
            "workspaces": [{"name": "w0", "count": 0}, {"name": "w1", "memory_limit": "much"}],
        }
    )
    assert [fault.partition(":")[0] for fault in sorted(faults)] == [
        "checkpoint_deadline_s",
        "colour",
        "seed",
        "workspaces.0.count",
        "workspaces.1.memory_limit",
    ]


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ({"name": "w", "count": 2}, "{index}"),
        ({"name": "a/b"}, "cannot name a workspace"),
        ({"name": ""}, "cannot name a workspace"),
        ({"name": "w:child"}, "cannot name a workspace"),
        ({"name": "x" * 129}, "cannot name a workspace"),
        ({"name": "w", "num_gpus": 1.5}, "whole"),
        ({"name": "w", "num_gpus": -1}, "num_gpus"),
        ({"name": "w", "num_cpus": -0.5}, "num_cpus"),
        ({"name": "w", "memory_limit": 0}, "memory_limit"),
        ({"name": "w", "memory_limit": "-1MiB"}, "512MiB"),
        ({"name": "w", "memory_limit": "1 XB"}, "512MiB"),
        ({"name": "w", "resources": {"ssd": 0}}, "resources.ssd"),
        ({"count": 1}, "name"),
    ],
)
def test_a_group_that_cannot_be_is_refused(group: dict[str, Any], says: str) -> None:
    [fault] = faults_of({"workspaces": [group]})
    assert fault.startswith("workspaces.0")
    assert says in fault


@pytest.mark.parametrize("value", [{}, {"workspaces": []}, [], None, "w0", {"workspaces": None}])
def test_a_configuration_without_workspaces_is_refused(value: Any) -> None:
    assert len(faults_of(value)) == 1


def test_a_name_that_two_groups_give_is_refused() -> None:
    [fault] = faults_of({"workspaces": [{"name": "w{index}", "count": 3}, {"name": "w1"}, {"name": "w2"}]})
    assert "named twice: w1, w2" in fault


def test_a_cluster_name_that_cannot_be_is_refused() -> None:
    [fault] = faults_of({**LEAST, "name": "my cluster"})
    assert "'my cluster'" in fault


# --- values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("512 MiB", 2**29), ("2GB", 2 * 10**9), ("1.5KiB", 1536), (" 3tib ", 3 * 2**40), (77, 77)],
)
def test_a_size_is_a_number_of_bytes_or_a_number_with_a_unit(text: object, size: int) -> None:
    assert parse_size(text) == size
    assert make_config({"workspaces": [{"name": "w", "memory_limit": text}]}).workspaces[0].memory_limit == size


def test_a_group_stands_for_count_names_in_the_order_of_their_ranks() -> None:
    config = make_config({"workspaces": [{"name": "b{index}", "count": 2}, {"name": "a"}]})
    assert config.workspace_names() == ["b0", "b1", "a"]
    assert config.group_of("b1") is config.workspaces[0]


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_config(LEAST).seed = 3  # type: ignore[misc]


# --- files -----------------------------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no\.yaml"):
        load_config(tmp_path / "no.yaml")


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\xff", b"workspaces: *anchor"])
def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"config\.yaml"):
        load_config(path)


def test_the_faults_of_a_file_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("workspaces: []\n", encoding="utf-8")
    with pytest.raises(InvalidInputError, match=r"config\.yaml.*is not a cluster's configuration"):
        load_config(str(path))


def test_a_file_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("workspaces: !!python/object/apply:os.getcwd []\n", encoding="utf-8")
    with pytest.raises(InvalidInputError, match="no YAML"):
        load_config(path)
