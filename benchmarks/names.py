"""``cluster.blob_names()``, against the least that any fan-out over actors can cost."""

from __future__ import annotations

import itertools

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


def _fill(cluster: Cluster, count: int) -> None:
    """Give every workspace that many names. A created net's outputs are there, uninitialised, before it runs."""
    cluster.workspaces["w0"].feed_blob("changing", 0)
    net = Net("names")
    net.add(
        "Split", ["changing"], [f"tower/layer_{index // 4:05d}/parameter_{index % 4}" for index in range(count - 1)]
    )
    references = [handle.submit("feed_blob", "changing", 0) for handle in cluster.workspaces.values()]
    ray.get(references)
    cluster.create_net(net)


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
    with local_ray(), launched("names", WORKSPACES) as cluster:
        plain = [ray.remote(num_cpus=0)(_Plain).remote() for _ in range(WORKSPACES)]
        _fill(cluster, count)
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
    size = f"{WORKSPACES} x {count:,} names"
    return [
        Row(
            what=f"{size}, first, nobody knows them, / bare fan-out",
            value=found.ratio("all new", "fan-out"),
            unit="x",
            target=3.0,
            absolute=found.milliseconds("all new", "fan-out"),
        ),
        Row(
            what=f"{size}, first of a client, the coordinator knows them, / bare fan-out",
            value=found.ratio("new client", "fan-out"),
            unit="x",
            target=3.0,
            absolute=found.milliseconds("new client", "fan-out"),
        ),
        Row(
            what=f"{size}, unchanged, / bare fan-out",
            value=found.ratio("unchanged", "fan-out"),
            unit="x",
            target=1.3,
            absolute=found.milliseconds("unchanged", "fan-out"),
        ),
    ]


SECTION = Section(
    name="names",
    title="The catalog: cluster.blob_names()",
    bound="First: the CPU, for packing the names (all workspaces share two cores) and for making the strings in the "
    "client, and a second hop, by way of the coordinator; unchanged: an actor call per workspace, and one more.",
    run=run,
)
