"""What the demo trains: handwritten digits, a small network built from operators, one shard per workspace.

A net does everything itself, the choice of the mini-batch included, so ``run_net("train", iterations=100)`` is 100
steps of training without a word from the driver. What a step depends on (parameters, momentum, the step counter,
the images) lies in blobs, so a checkpoint has all of it.
"""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ops.definitions import OperatorDef
from ...ops.gradient import add_gradient_operators
from ...ops.net import Net
from ...ops.values import Array

WORKSPACES = ("w0", "w1", "w2", "w3")
PARAMETERS = ("fc1_w", "fc1_b", "fc2_w", "fc2_b")
STEP = "step"
"""The blob that counts the steps; whoever resumes asks it where training stands."""
ACCURACY = "test_accuracy"

_PIXELS, _HIDDEN, _CLASSES = 64, 64, 10
_SHARD_IMAGES, _BATCH_IMAGES = 360, 40
_DARKEST = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long to train, and when to be cruel.

    Attributes:
        steps: Steps of training, each over one mini-batch per workspace.
        checkpoint_every: Steps between two checkpoints.
        kill_workspace_after: A workspace is killed at the first news of a later step.
        kill_driver_after: Likewise the driver.
        least_accuracy: Test accuracy that the end must pass, from 0 to 1.
    """

    steps: int
    checkpoint_every: int
    kill_workspace_after: int
    kill_driver_after: int
    least_accuracy: float


FULL = Plan(steps=1200, checkpoint_every=200, kill_workspace_after=440, kill_driver_after=840, least_accuracy=0.95)
QUICK = Plan(steps=300, checkpoint_every=100, kill_workspace_after=110, kill_driver_after=210, least_accuracy=0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """Images as rows of 64 pixels from 0 to 1, float32, and their labels, int32.

    Attributes:
        shards: For each workspace ``(360, 64)`` and ``(360,)``.
        test: ``(357, 64)`` and ``(357,)``, which no workspace learns from.
    """

    shards: tuple[tuple[Array, Array], ...]
    test: tuple[Array, Array]


def load_digits() -> Digits:
    """Read scikit-learn's bundled data set, shuffle it (always alike) and deal it out.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    # Whoever resumes from a checkpoint has the images already, and need not wait for this import.
    datasets: Any = importlib.import_module("sklearn.datasets")
    bunch = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    images = (bunch.data[order] / _DARKEST).astype(np.float32)
    labels = bunch.target[order].astype(np.int32)
    bounds = [_SHARD_IMAGES * rank for rank in range(len(WORKSPACES) + 1)]
    return Digits(
        shards=tuple((images[begin:end], labels[begin:end]) for begin, end in itertools.pairwise(bounds)),
        test=(images[bounds[-1] :], labels[bounds[-1] :]),
    )


def first_net() -> Net:
    """Return the net that runs once: every workspace fills its parameters, then all take those of w0."""
    net = Net("first")
    net.XavierFill([], "fc1_w", shape=[_HIDDEN, _PIXELS])
    net.ConstantFill([], "fc1_b", shape=[_HIDDEN])
    net.XavierFill([], "fc2_w", shape=[_CLASSES, _HIDDEN])
    net.ConstantFill([], "fc2_b", shape=[_CLASSES])
    net.Broadcast(PARAMETERS, PARAMETERS, root=0)
    for name in PARAMETERS:
        net.ConstantFill([name], f"{name}_momentum", value=0.0)
    net.GivenTensorInt64Fill([], STEP, values=[0], shape=[1])
    net.GivenTensorInt64Fill([], "batch_size", values=[_BATCH_IMAGES], shape=[1])
    return net


def train_net() -> Net:
    """Return one step of training: batch, forward, backward, the mean of all gradients, update."""
    model = Net("model")
    _layers(model, "batch", "logits")
    model.SoftmaxWithLoss(["logits", "batch_labels"], ["probabilities", "loss"])
    add_gradient_operators(model, ["loss"])
    return Net("train", [*_batch_operators(), *model.operators, *_update_operators()])


def test_net() -> Net:
    """Return the net that classifies the test images and compares with their labels."""
    net = Net("test")
    _layers(net, "test_images", "test_logits")
    net.Softmax(["test_logits"], "test_probabilities")
    net.Accuracy(["test_probabilities", "test_labels"], ACCURACY)
    return net


def _layers(net: Net, images: str, logits: str) -> None:
    net.FC([images, "fc1_w", "fc1_b"], f"{images}_hidden")
    net.Relu([f"{images}_hidden"], f"{images}_active")
    net.FC([f"{images}_active", "fc2_w", "fc2_b"], logits)


def _batch_operators() -> tuple[OperatorDef, ...]:
    """The step's number says which part of the shard comes next: nobody outside has to remember it."""
    net = Net("batch")
    net.Iter([STEP], STEP)
    net.Mod([STEP], "batch_number", divisor=_SHARD_IMAGES // _BATCH_IMAGES)
    net.Mul(["batch_number", "batch_size"], "batch_begin")
    net.Add(["batch_begin", "batch_size"], "batch_end")
    net.Slice(["images", "batch_begin", "batch_end"], "batch")
    net.Slice(["labels", "batch_begin", "batch_end"], "batch_labels")
    return net.operators


def _update_operators() -> tuple[OperatorDef, ...]:
    net = Net("update")
    gradients = [f"{name}_grad" for name in PARAMETERS]
    net.Allreduce(gradients, gradients, reduce="mean")
    net.LearningRate([STEP], "learning_rate", policy="step", base_lr=0.1, stepsize=200, gamma=0.7)
    for name, gradient in zip(PARAMETERS, gradients, strict=True):
        momentum = f"{name}_momentum"
        net.MomentumSGDUpdate([gradient, momentum, "learning_rate", name], [gradient, momentum, name], momentum=0.9)
    return net.operators
