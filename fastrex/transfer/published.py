"""Published figures of public ResNet-50 encoders, as their own pages give them: beside a measured table, never in it.

Only what could be read at its source is here. No figure of a single transfer set is: the papers' tables could not be
read. Figures that are measured in another way (k-NN, fine-tuned) say so, and are no rivals of a logistic regression.
"""

from __future__ import annotations

from dataclasses import dataclass

_TREX = "README of naver/trex"


@dataclass(frozen=True)
class Published:
    """What somebody has published of an encoder.

    name: the encoder. how: kind of measurement. source: where it stands. top1: on IN1K, a share. log_odds: mean
    over the 15 transfer sets without IN1K.
    """

    name: str
    how: str
    source: str
    top1: float
    log_odds: float | None = None


# Its README names the suite; that the figure of IN1K comes from it too is this project's reading.
_LOGISTIC = "logistic regression on frozen features"

PUBLISHED = (
    Published("t-ReX, paper", _LOGISTIC, _TREX, 0.780, 1.1704),
    Published("t-ReX*, paper", _LOGISTIC, _TREX, 0.802, 0.8829),
    Published("t-ReX, authors' re-run", _LOGISTIC, _TREX, 0.779, 1.1664),
    Published("t-ReX*, authors' re-run", _LOGISTIC, _TREX, 0.802, 0.8800),
    Published("RSB-A1, best seed", "its own classifier", "arXiv 2110.00476", 0.804),
    Published("RSB-A1, re-run", "its own classifier", "open-mmlab/mmpretrain", 0.8012),
    Published("DINO, linear", "linear classifier on frozen features", "facebookresearch/dino", 0.753),
    Published("DINO, k-NN", "weighted k-NN", "facebookresearch/dino", 0.675),
    Published(
        "PAWS, nearest neighbours",
        "soft nearest neighbours, 10 % of the labels, 300 epochs",
        "facebookresearch/suncet",
        0.731,
    ),
    Published("PAWS, fine-tuned", "fine-tuned, 10 % of the labels, 300 epochs", "facebookresearch/suncet", 0.755),
    Published(
        "SupCon", "linear classifier on frozen features, momentum encoder", "README of HobbitLong/SupContrast", 0.791
    ),
)

# Between the paper's figures and those of its released code.
NOISE = "run-to-run noise of the published t-ReX figures: 0.1 points of top-1, 0.004 of mean log-odds"
