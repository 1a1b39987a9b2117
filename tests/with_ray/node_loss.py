"""A driver of its own for test_nodes.py: several Ray nodes on one machine, one of which is killed. Prints JSON."""

from __future__ import annotations

import json
import os
import sys

import ray
from ray.cluster_utils import Cluster as RayNodes
from support import content, prepare, wait_until

from blobspace.cluster import Cluster
from blobspace.ops import InvalidInputError, WorkspaceLostError

FAST_DETECTION = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 2,
}


def main(root: str) -> dict[str, object]:
    nodes = RayNodes(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": FAST_DETECTION},
    )
    workers = [nodes.add_node(num_cpus=1) for _ in range(3)]
    ray.init(address=nodes.address, log_to_driver=False, namespace="nodes")
    try:
        # Four nodes of one CPU and three workspaces of one CPU: each has a node of its own, and one node is spare.
        cluster = Cluster.launch(
            {
                "name": "nodes",
                "checkpoint_root": root,
                "workspaces": [{"name": "w{index}", "count": 3, "num_cpus": 1}],
            }
        )
        prepare(cluster)
        cluster.run_net("train", 4)
        cluster.checkpoint(4)
        cluster.run_net("train", 6)
        quiet = content(cluster)
        placed = {member.name: member.node_id for member in cluster.view().members}

        victim = next(worker for worker in workers if worker.node_id in placed.values())
        lost = next(name for name, node in placed.items() if node == victim.node_id)
        running = [workspace.submit("run_net", "train", 10**7) for workspace in cluster.workspaces.values()]
        nodes.remove_node(victim, allow_graceful=False)
        errors: list[str] = []
        for reference in running:
            try:
                ray.get(reference, timeout=60)
            except ray.exceptions.RayError as error:
                errors.append(type(error).__name__)
        try:
            cluster.workspaces[lost].blobs()
            message = ""
        except WorkspaceLostError as error:
            message = str(error)

        wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 3)
        report = cluster.recover()
        cluster.run_net("train", 6)
        after = {member.name: member.node_id for member in cluster.view().members}
        identical = content(cluster) == quiet

        # Another node goes, and now there is none to spare.
        second = next(worker for worker in workers if worker is not victim and worker.node_id in after.values())
        nodes.remove_node(second, allow_graceful=False)
        wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 2)
        try:
            cluster.recover()
            refusal = ""
        except InvalidInputError as error:
            refusal = str(error)
        return {
            "placed": placed,
            "after": after,
            "lost": lost,
            "victim": victim.node_id,
            "errors": errors,
            "message": message,
            "recreated": list(report.recreated),
            "step": report.step,
            "identical": identical,
            "refusal": refusal,
        }
    finally:
        ray.shutdown()
        nodes.shutdown()


if __name__ == "__main__":
    os.environ["RAY_AUTH_MODE"] = "disabled"
    print("RESULT " + json.dumps(main(sys.argv[1])), flush=True)
