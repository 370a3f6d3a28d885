"""Whether a cluster has room for a job, asked before the job starts: Ray itself would wait for ever, in silence.

Totals are counted, not what is free: another job's end is worth waiting for, a machine that is not there is not.
Nodes that an autoscaler could still add are not counted either; give their type `min_workers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import ray

from kddata.errors import ConfigError, ResourceError

_EPSILON = 1e-6  # Ray counts in ten-thousandths


def require_room(what: str, count: int, *, cpus: float, gpus: float, key: str) -> None:
    """Raises ResourceError unless `count` processes with so many CPUs and GPUs each fit on the nodes that are up.

    Args:
        what: the processes, in the plural.
        key: of the job file, which sets their number.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fit = room(nodes, cpus=cpus, gpus=gpus)
    if fit >= count:
        return
    each = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
    total = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    raise ResourceError(
        f"the cluster has room for all {what} at once",
        actual=f"{count} {what} of {each} each, and room for {fit}: "
        f"{total['CPU']:g} CPUs and {total['GPU']:g} GPUs on {len(nodes)} node{'s' * (len(nodes) != 1)}",
        where=key,
        fix=f"set {key}={fit}, or start more nodes first" if fit else "ask for less for each, or start larger nodes",
    )


def room(nodes: list[dict[str, float]], *, cpus: float, gpus: float) -> int:
    """How many equal processes fit on nodes with these resources; no process is split over two."""
    fits = []
    for node in nodes:
        wanted = [(node.get("CPU", 0), cpus), (node.get("GPU", 0), gpus)]
        fits.append(min((math.floor(has / asks + _EPSILON) for has, asks in wanted if asks > 0), default=0))
    return sum(fits)


def require_shared(locations: Mapping[str, str | tuple[str, ...] | None]) -> None:
    """Raises ConfigError for a plain path that several nodes would read, each its own.

    Args:
        locations: by key of the job file.
    """
    if sum(node["Alive"] for node in ray.nodes()) < 2:
        return
    for key, value in locations.items():
        for location in (value,) if isinstance(value, str) else value or ():
            if "://" not in location:
                raise ConfigError(
                    "on several nodes, every location is a URL that all of them see",
                    actual=location,
                    where=key,
                    fix="name an object store (s3://...), or a shared file system as file:///...",
                )
