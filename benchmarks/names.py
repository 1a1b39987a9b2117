"""``cluster.blob_names()``, against the least that any fan-out over actors can cost."""

from __future__ import annotations

import itertools
from typing import Any

import ray

from blobspace.cluster import Cluster
from blobspace.ops import Net

from .clusters import launched, local_ray
from .measuring import Row, Section, Settings, interleave, timed

WORKSPACES = 8
NAMES = 10_000
_ROUNDS = 41


class _Plain:
    """An actor that knows one number."""

    def number(self) -> int:
        return 1


def _fill(cluster: Cluster, count: int, *, are_replicas: bool) -> None:
    """Give every workspace that many names. A created net's outputs are there, uninitialised, before it runs."""
    references = []
    for name, handle in cluster.workspaces.items():
        handle.feed_blob("changing", 0)
        tower = "tower" if are_replicas else f"tower_{name}"
        net = Net("names")
        net.add(
            "Split",
            ["changing"],
            [f"{tower}/layer_{index // 4:05d}/parameter_{index % 4}" for index in range(count - 1)],
        )
        references.append(handle.submit("create_net", net))
    ray.get(references)


def _change_one_name(cluster: Cluster, number: int) -> None:
    """Replace a name in every workspace, so that all names must travel again."""
    references = []
    for handle in cluster.workspaces.values():
        references.append(handle.submit("create_blob", f"round_{number}"))
        if number:
            references.append(handle.submit("remove_blob", f"round_{number - 1}"))
    ray.get(references)


def run(settings: Settings) -> list[Row]:
    count = NAMES // 10 if settings.is_quick else NAMES
    with local_ray():
        plain = [ray.remote(num_cpus=0)(_Plain).remote() for _ in range(WORKSPACES)]
        return [
            row for are_replicas in (True, False) for row in _measure(settings, plain, count, are_replicas=are_replicas)
        ]


def _measure(settings: Settings, plain: list[Any], count: int, *, are_replicas: bool) -> list[Row]:
    with launched("names", WORKSPACES) as cluster:
        _fill(cluster, count, are_replicas=are_replicas)
        numbers = itertools.count()

        def fan_out() -> float:
            return timed(lambda: ray.get([actor.number.remote() for actor in plain]))

        def first_of_all() -> float:
            _change_one_name(cluster, next(numbers))
            newcomer = Cluster.attach(cluster.name)
            return timed(newcomer.blob_names)

        def first_of_client() -> float:
            Cluster.attach(cluster.name).blob_names()
            newcomer = Cluster.attach(cluster.name)
            return timed(newcomer.blob_names)

        def unchanged() -> float:
            cluster.blob_names()
            return timed(cluster.blob_names)

        found = interleave(
            {"fan-out": fan_out, "all new": first_of_all, "new client": first_of_client, "unchanged": unchanged},
            rounds=settings.rounds(_ROUNDS),
            settings=settings,
        )
        names = cluster.blob_names()
        assert {len(own) for own in names.values()} == {count + 1}, "every workspace shows all its names"
    kind = "the same in all" if are_replicas else "others in each"
    what = f"{WORKSPACES} x {count:,} names, {kind}"
    return [
        Row(
            what=f"{what}, {moment}, / bare fan-out",
            value=found.ratio(contender, "fan-out"),
            unit="x",
            target=target,
            absolute=found.milliseconds(contender, "fan-out"),
        )
        for moment, contender, target in (
            ("first, nobody has packed them", "all new", 3.0),
            ("first of another client", "new client", 3.0),
            ("unchanged", "unchanged", 1.3),
        )
    ]


SECTION = Section(
    name="names",
    title="The catalog: cluster.blob_names()",
    bound="First: the CPU. Each 10,000 names that are like no other's cost about 0.8 ms to pack in the workspace and "
    "0.6 ms to make into strings in the client, and 8 workspaces and the client share two cores; names that replicas "
    "share are unpacked once. Unchanged: an actor call per workspace.",
    run=run,
)
