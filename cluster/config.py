"""The configuration of a cluster: typed values, read from YAML, checked in one place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..ops.errors import InvalidInputError, NotFoundError
from ..workspace_actors.names import check_workspace_name

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?b|b)?\s*\Z", re.IGNORECASE)
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_size(value: object) -> object:
    """Return a number of bytes from text such as ``"512 MiB"``; anything that is no text is returned as it is."""
    if not isinstance(value, str):
        return value
    match = _SIZE.match(value)
    if match is None:
        raise ValueError(f"expected a size such as 512MiB or 2GB, found {value!r}")
    return int(float(match[1]) * _UNITS[(match[2] or "b").lower()])


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WorkspaceGroup(_Strict):
    """Workspaces that are alike.

    Attributes:
        name: The workspace's name; with ``count`` it must contain ``{index}``, counted from 0.
        count: How many.
        num_cpus: CPUs to reserve per workspace, for admission; may be 0.
        num_gpus: GPUs to reserve; a fraction shares one. More than 0 places the workspace on CUDA.
        memory_limit: Greatest bytes of all blobs and snapshots, such as ``"2GiB"``; None means no limit.
        resources: Custom Ray resources to reserve.
        labels: Ray node labels that the node must have.
        node: Id of the one node to run on; None means any.
    """

    name: str
    count: Annotated[int, Field(ge=1, le=10_000)] = 1
    num_cpus: Annotated[float, Field(ge=0)] = 0.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    memory_limit: Annotated[int | None, BeforeValidator(parse_size), Field(gt=0)] = None
    resources: dict[str, Annotated[float, Field(gt=0)]] = {}
    labels: dict[str, str] = {}
    node: str | None = None

    @model_validator(mode="after")
    def _check(self) -> WorkspaceGroup:
        if self.count > 1 and "{index}" not in self.name:
            raise ValueError(f"name {self.name!r} stands for {self.count} workspaces and must contain {{index}}")
        if self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ValueError(f"num_gpus above 1 must be whole, found {self.num_gpus}")
        for name in self.workspace_names():
            try:
                check_workspace_name(name)
            except InvalidInputError as error:
                raise ValueError(error.message) from None
        return self

    def workspace_names(self) -> list[str]:
        """Return the names that this group stands for."""
        return [self.name.replace("{index}", str(index)) for index in range(self.count)]


class ClusterConfig(_Strict):
    """A cluster of workspaces.

    Attributes:
        name: Tells clusters on one Ray apart.
        seed: Start of every workspace's random generator, together with its name.
        checkpoint_root: Folder of the checkpoints, on storage that all nodes share; None means that each call
            names its own.
        placement_deadline_s: How long to wait for Ray to start the workspaces.
        checkpoint_deadline_s: How long a checkpoint or a restore may take.
        collective_deadline_s: How long a collective waits for the last member.
        modules: Python modules that every workspace imports when it starts; they register your own operators.
        workspaces: The groups.
    """

    name: str = "default"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    checkpoint_root: str | None = None
    placement_deadline_s: Annotated[float, Field(gt=0)] = 60.0
    checkpoint_deadline_s: Annotated[float, Field(gt=0)] = 600.0
    collective_deadline_s: Annotated[float, Field(gt=0)] = 300.0
    modules: list[str] = []
    workspaces: Annotated[list[WorkspaceGroup], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> ClusterConfig:
        try:
            check_workspace_name(self.name)
        except InvalidInputError as error:
            raise ValueError(error.message) from None
        names = [name for group in self.workspaces for name in group.workspace_names()]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise ValueError(f"workspaces are named twice: {', '.join(twice)}")
        return self

    def workspace_names(self) -> list[str]:
        """Return all workspace names; a workspace's place in this list is its rank."""
        return [name for group in self.workspaces for name in group.workspace_names()]

    def group_of(self, workspace: str) -> WorkspaceGroup:
        """Return the group that a workspace belongs to."""
        return next(group for group in self.workspaces if workspace in group.workspace_names())


def make_config(value: Any, *, source: str = "the configuration") -> ClusterConfig:
    """Check a plain value and return the configuration.

    Raises:
        InvalidInputError: It does not fit; every fault is listed, with the legal keys where one is unknown.
    """
    if isinstance(value, ClusterConfig):
        return value
    try:
        return ClusterConfig.model_validate(value)
    except pydantic.ValidationError as error:
        faults = [_fault(fault) for fault in error.errors()]
        lines = "\n".join(f"  - {fault}" for fault in faults)
        raise InvalidInputError(f"{source} is not a cluster's configuration:\n{lines}", faults=faults) from None


def load_config(path: str | Path) -> ClusterConfig:
    """Read a YAML file.

    Raises:
        NotFoundError: There is no such file.
        InvalidInputError: It is no YAML, or no configuration.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"There is no configuration file {str(path)!r}.", path=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"Configuration file {str(path)!r} cannot be read: {error}.") from None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidInputError(f"Configuration file {str(path)!r} is no YAML: {error}.", path=str(path)) from None
    return make_config(value, source=f"Configuration file {str(path)!r}")


def _fault(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"]) or "the whole"
    if fault["type"] == "extra_forbidden":
        model = WorkspaceGroup if "workspaces" in fault["loc"] else ClusterConfig
        return f"{where}: unknown key; expected one of {', '.join(model.model_fields)}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{where}: {message} (found {fault.get('input')!r:.80})"
