"""What can be computed: operators, nets, gradients, and the registry. No Ray, no files, no clock."""

from . import library as _library
from .definitions import DeviceOption, GradientSlice, NetDef, OperatorDef, operator_def
from .errors import (
    BlobspaceError,
    ConflictError,
    CorruptCheckpointError,
    DeadlineError,
    InternalError,
    InvalidInputError,
    MemoryLimitError,
    NotFoundError,
    StorageError,
    WorkspaceLostError,
)
from .execution import OperatorCall
from .gradient import add_gradient_operators, gradient_operators
from .net import Net
from .registry import (
    GradientCall,
    GradientResult,
    documentation,
    gradient_not_implemented_yet,
    no_gradient,
    operator_types,
    register_cpu_operator,
    register_cuda_operator,
    register_gradient,
    register_operator,
    register_schema,
    should_not_do_gradient,
)
from .schema import UNBOUNDED, ArgType, Argument, OperatorSchema
from .values import Kind

del _library

__all__ = [
    "UNBOUNDED",
    "ArgType",
    "Argument",
    "BlobspaceError",
    "ConflictError",
    "CorruptCheckpointError",
    "DeadlineError",
    "DeviceOption",
    "GradientCall",
    "GradientResult",
    "GradientSlice",
    "InternalError",
    "InvalidInputError",
    "Kind",
    "MemoryLimitError",
    "Net",
    "NetDef",
    "NotFoundError",
    "OperatorCall",
    "OperatorDef",
    "OperatorSchema",
    "StorageError",
    "WorkspaceLostError",
    "add_gradient_operators",
    "documentation",
    "gradient_not_implemented_yet",
    "gradient_operators",
    "no_gradient",
    "operator_def",
    "operator_types",
    "register_cpu_operator",
    "register_cuda_operator",
    "register_gradient",
    "register_operator",
    "register_schema",
    "should_not_do_gradient",
]
