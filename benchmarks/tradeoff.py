"""The trade-off between the training task and transfer, at a size that two cores can do: each step of the method in
turn, everything else equal, several seeds.

``python -m benchmarks tradeoff --data ARCHIVES --out WORK`` trains what is not trained yet, probes what is not probed
yet, and writes the table, so it can be stopped and started again.
"""

from __future__ import annotations

from . import experiment_run
from .experiment import Arm, Experiment

COSINE, OCM = "objective.name=cosine_softmax", "objective.name=class_means"
PLAIN = ("projector.enabled=false", "objective.name=softmax")
YELLOW, PURPLE, BLUE, GREEN = "#efb118", "#a463f2", "#4269d0", "#3ca951"

ARMS = (
    Arm("base", "Base: cross-entropy, one crop", (*PLAIN, "data.local_crops=0")),
    # The recipe's learning rate was chosen for the whole method: whether another one suits the base better is measured.
    Arm("base-slow", "Base, a quarter of the learning rate", (*PLAIN, "data.local_crops=0", "optim.lr=0.1")),
    Arm("base-fast", "Base, four times the learning rate", (*PLAIN, "data.local_crops=0", "optim.lr=1.6")),
    Arm("mc", "+ multi-crop", PLAIN, YELLOW),
    Arm("cos", "+ cosine softmax", ("projector.enabled=false", COSINE), PURPLE),
    *(
        Arm(f"pr{depth}", f"+ projector, {depth} hidden", (COSINE, f"projector.hidden_layers={depth}"), BLUE)
        for depth in range(4)
    ),
    Arm("ocm1", "+ OCM, projector 1 hidden", (OCM, "projector.hidden_layers=1"), GREEN),
    Arm("ocm3", "+ OCM, projector 3 hidden", (OCM, "projector.hidden_layers=3"), GREEN),
)
# Pairs (with, without) in the order of the method; the same seeds on both sides.
STEPS = (
    ("a quarter of the learning rate", "base-slow", "base"),
    ("four times the learning rate", "base-fast", "base"),
    ("multi-crop", "mc", "base"),
    ("cosine softmax", "cos", "mc"),
    *((f"projector of {depth} hidden layers", f"pr{depth}", "cos") for depth in range(4)),
    ("3 instead of 0 hidden layers", "pr3", "pr0"),
    ("OCM behind 1 hidden layer", "ocm1", "pr1"),
    ("OCM behind 3 hidden layers", "ocm3", "pr3"),
    ("all of it with 1 hidden layer", "ocm1", "base"),
    ("all of it with 3 hidden layers", "ocm3", "base"),
)
NOTES = (
    "All arms see the same images for the same number of steps, with the same learning rate and schedule; a step with "
    "multi-crop computes about twice as much as one without, and OCM adds a momentum encoder.",
)

TRADEOFF = Experiment(
    name="tradeoff",
    title="Training task against transfer",
    help="""Train each step of the method with several seeds, and probe what transfers.

    \b
    python -m benchmarks tradeoff --data ARCHIVES --out WORK --json benchmarks/results/tradeoff.json
    python -m benchmarks tradeoff --data ARCHIVES --out WORK --size gpu     # on a GPU
    """,
    recipe="cifar10",
    arms=ARMS,
    steps=STEPS,
    notes=NOTES,
    joined=tuple(f"pr{depth}" for depth in range(4)),
)
command = experiment_run.command(TRADEOFF)
