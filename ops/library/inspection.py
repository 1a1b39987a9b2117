"""Operators that look at the workspace itself."""

from __future__ import annotations

from ..execution import OperatorCall
from ..registry import Step, register_operator, should_not_do_gradient
from ..schema import ArgType, Argument, OperatorSchema
from ..values import string_tensor


@register_operator(
    OperatorSchema(
        type="GetAllBlobNames",
        doc="Return a 1D tensor of strings containing the names of each blob in the active workspace.",
        inputs=(0, 0),
        outputs=(1, 1),
        output_names=("blob_names: 1D tensor of strings containing blob names, its own among them.",),
        arguments=(
            Argument(
                name="include_shared",
                type=ArgType.BOOL,
                default=True,
                doc="Whether to include blobs inherited from parent workspaces.",
            ),
        ),
    ),
    dynamic=True,
)
def get_all_blob_names(call: OperatorCall) -> Step:
    """List names in Caffe2's order: the workspace's own sorted bytewise, then its parent's, duplicates kept."""

    def step() -> None:
        names = call.environment.names(include_shared=call.arguments["include_shared"])
        call.set_strings(0, string_tensor(names))

    return step


should_not_do_gradient("GetAllBlobNames")
