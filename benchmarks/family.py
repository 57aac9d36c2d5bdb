"""The objectives beside one another, at a size that two cores can do: the same data set, network, schedule and number
of steps, several seeds.

``python -m benchmarks family --data ARCHIVES --out WORK`` trains what is not trained yet, probes what is not probed
yet, and writes the table, so it can be stopped and started again.
"""

from __future__ import annotations

from . import experiment_run
from .experiment import Arm, Experiment

GREY, YELLOW, PURPLE, GREEN = "#6e7781", "#efb118", "#a463f2", "#3ca951"
RED, BLUE, BROWN = "#ff725c", "#4269d0", "#9c6b4e"

BARE = "projector.enabled=false"
SOFTMAX, COSINE = "objective.name=softmax", "objective.name=cosine_softmax"
ONE_CROP = "data.local_crops=0"
# As many pixels as the one large and four small crops of the other arms.
TWO_CROPS = (ONE_CROP, "data.global_crops=2")
# The heads of SupCon and MoCo v2: one hidden layer with a ReLU, no BatchNorm, nothing normalised before it.
HEAD = ("projector.activation=relu", "projector.batch_norm=false", "projector.input_norm=false")
QUEUE = "objective.queue_size=4096"
TUNE = (BARE, ONE_CROP, "optim.lr=0.1", "optim.warmup_epochs=0.25")

ARMS = (
    Arm("softmax", "cross-entropy, one crop", (BARE, SOFTMAX, ONE_CROP), GREY),
    Arm("softmax_mc", "cross-entropy", (BARE, SOFTMAX), GREY),
    Arm("softmax_two", "cross-entropy, two crops", (*TWO_CROPS, BARE, SOFTMAX), GREY),
    Arm(
        "regularized",
        "BCE, mixup, CutMix, 2 repeats, one crop",
        (BARE, SOFTMAX, ONE_CROP, "objective.loss=binary", "augment.mixup=0.2", "augment.cutmix=1.0", "data.repeats=2"),
        GREY,
    ),
    Arm(
        "sl_mlp",
        "SL-MLP: cross-entropy behind a projector",
        (SOFTMAX, "projector.activation=relu", "projector.input_norm=false"),
        YELLOW,
    ),
    Arm("ncm", "NCM: running class means", (BARE, "objective.name=ncm"), BROWN),
    Arm("cosine", "cosine softmax behind a projector", (COSINE,), PURPLE),
    Arm("cosine_two", "cosine softmax behind a projector, two crops", (*TWO_CROPS, COSINE), PURPLE),
    Arm("cosface", "cosine softmax, CosFace margin 0.2", (COSINE, "objective.margin=0.2"), PURPLE),
    Arm("ocm", "t-ReX: class means behind a projector", ("objective.name=class_means",), GREEN),
    Arm("supcon", "SupCon, two crops", (*TWO_CROPS, *HEAD, "objective.name=supcon"), RED),
    Arm("supcon_trex", "SupCon behind t-ReX's projector, two crops", (*TWO_CROPS, "objective.name=supcon"), RED),
    Arm("supcon_queue", "SupCon with a queue, two crops", (*TWO_CROPS, *HEAD, "objective.name=supcon", QUEUE), RED),
    Arm("look", "LOOK", ("objective.name=look", QUEUE, "objective.neighbours=256"), RED),
    Arm("moco", "MoCo v2, no labels, two crops", (*TWO_CROPS, *HEAD, "objective.name=moco", QUEUE), BLUE),
    Arm(
        "mochi",
        "MoCHi, no labels, two crops",
        (*TWO_CROPS, *HEAD, "objective.name=mochi", QUEUE, "objective.hardest=256", "objective.synthetic=256",
         "objective.harder=128"),
        BLUE,
    ),
    Arm("pretrained", "what the next two start from", (BARE, SOFTMAX, ONE_CROP), share=0.6),
    Arm("tuned", "cross-entropy, then cross-entropy again", (*TUNE, SOFTMAX), GREY, start="pretrained"),
    Arm("schane", "cross-entropy, then SCHaNe", (*TUNE, "objective.name=schane"), RED, start="pretrained"),
)  # fmt: skip
# Each names all in which its two arms differ; their settings are compared in the tests.
STEPS = (
    ("four small crops beside the large one", "softmax_mc", "softmax"),
    ("two large crops instead of one", "softmax_two", "softmax"),
    ("BCE, mixup, CutMix, and two repeats of half of the images", "regularized", "softmax"),
    ("SL-MLP's projector (ReLU, BatchNorm) behind cross-entropy", "sl_mlp", "softmax_mc"),
    ("distances to running class means instead of products with learnt weights", "ncm", "softmax_mc"),
    ("cosine softmax behind t-ReX's projector instead of cross-entropy without one", "cosine", "softmax_mc"),
    ("two large crops instead of one large and four small ones", "cosine_two", "cosine"),
    ("a CosFace margin of 0.2 in the cosine softmax", "cosface", "cosine"),
    ("class means of a bank of momentum features instead of learnt weights", "ocm", "cosine"),
    (
        "all of t-ReX (projector, cosine, class means of momentum features) instead of cross-entropy",
        "ocm",
        "softmax_mc",
    ),
    ("SupCon and its head instead of cross-entropy, both on two crops", "supcon", "softmax_two"),
    ("t-ReX's projector instead of SupCon's head", "supcon_trex", "supcon"),
    (
        "SupCon instead of cosine softmax, both behind t-ReX's projector and on two crops",
        "supcon_trex",
        "cosine_two",
    ),
    (
        "a queue of momentum features instead of the batch's own for SupCon, one of the two crops in the gradient",
        "supcon_queue",
        "supcon",
    ),
    (
        "LOOK: nearest neighbours in a bank of momentum features instead of the learnt weights of cosine softmax",
        "look",
        "cosine",
    ),
    (
        "MoCo: momentum encoder, queue, head, no labels, one of the two crops in the gradient, instead of "
        "cross-entropy on two crops",
        "moco",
        "softmax_two",
    ),
    ("MoCHi's mixtures of hard negatives", "mochi", "moco"),
    (
        "a second stage: a new classifier, a warm-up and a quarter of the learning rate for the last epochs",
        "tuned",
        "softmax",
    ),
    ("SCHaNe instead of cross-entropy in the second stage, both on one crop", "schane", "tuned"),
)
NOTES = (
    "All arms train on the same data set for the same number of steps (regularized draws half of its images in an "
    "epoch), in the same network, with the learning rate and schedule of the recipe cifar10, which were chosen for "
    "class means and searched for no other arm; nor were the options of any objective, such as its temperature. A few "
    "epochs of a narrow network say how objectives start, not where they end: those that need long trainings (MoCo, "
    "MoCHi, mixing) are at a disadvantage.",
    "What a step computes differs. One crop of 32x32 is the cheapest; one large and four small crops, or two large "
    "ones, are twice that. Class means and LOOK add the momentum encoder's forward of one crop; SupCon with a queue, "
    "MoCo and MoCHi train on one of their two crops and show the other to the momentum encoder alone. Two repeats show "
    "half as many images of an epoch, twice each. Queues and banks hold 4096 features, a third of the images of the "
    "laptop size.",
    "MoCo and MoCHi use no labels. SCHaNe and its rival go on from the encoder of a shorter cross-entropy, at a "
    "quarter of the learning rate with a new classifier.",
)

FAMILY = Experiment(
    name="family",
    title="The objectives beside one another",
    help="""Train every objective with several seeds at an equal budget, and probe what transfers.

    \b
    python -m benchmarks family --data ARCHIVES --out WORK --json benchmarks/results/family-cpu.json
    python -m benchmarks family --data ARCHIVES --out WORK --size gpu       # on a GPU
    """,
    recipe="cifar10",
    arms=ARMS,
    steps=STEPS,
    notes=NOTES,
)
command = experiment_run.command(FAMILY)
