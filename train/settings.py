"""What a run does with its model and data: every key, its default and its meaning."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from glm5_jax.errors import InputError
from glm5_jax.inference.request import LARGEST_SEED

_FLOAT32_END = 2.0**128  # training computes in float32, where this is infinity
_INT32_END = 2**31  # and counts in int32


def _setting(
    default: Any, meaning: str, *, may_change: bool = False, choices: Sequence[str] | None = None
) -> Any:
    """Declares a setting; it may change when a run goes on if it has no part in what is learnt."""
    metadata = {"help": meaning, "may_change": may_change, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a stage of a run. Run files have a key for each, the command line an option.

    Parts of steps are those of the stage. Schedules count the steps that were not skipped.
    """

    stage: str = _setting(
        "sparse",
        "what is learnt: dense, the model, attending to all tokens; warmup, only the indexers, "
        "from that attention and no other loss; sparse, all, attending to the tokens that "
        "indexers select",
        choices=("dense", "warmup", "sparse"),
    )
    steps: int = _setting(1000, "steps to take in the stage")
    batch_size: int = _setting(16, "rows in a batch")
    first_batch_size: int = _setting(
        0, "rows in the first batches, batch_size halved once or more; 0: batch_size"
    )
    batch_warmup_steps: int = _setting(0, "over which first_batch_size doubles to batch_size")
    length: int = _setting(256, "tokens in a row")
    mixture: str = _setting(
        "", "weights of the data's sources, like code=2,prose=1; empty: all rows alike"
    )
    learning_rate: float = _setting(1e-3, "the highest, at the end of the warm-up")
    final_learning_rate: float = _setting(1e-4, "the one at the end")
    warmup_steps: int = _setting(50, "steps over which the learning rate rises from 0")
    schedule: str = _setting(
        "cosine",
        "how it falls then: cosine; linear; wsd, not before the last part",
        choices=("cosine", "linear", "wsd"),
    )
    decay_part: float = _setting(0.2, "the last part of all steps, over which wsd falls")
    optimizer: str = _setting(
        "adamw",
        "of matrices, but AdamW of embedding and head; muon_split cuts the up-projections of "
        "attention by heads",
        choices=("adamw", "muon", "muon_split"),
    )
    weight_decay: float = _setting(0.1, "of matrices")
    clip: float = _setting(1.0, "largest norm of all gradients together")
    mtp_depth: int = _setting(1, "tokens further ahead than the next that are learnt")
    mtp_weight: float = _setting(0.3, "of the loss of tokens further ahead")
    final_mtp_weight: float = _setting(0.3, "the one after mtp_weight_part of the steps")
    mtp_weight_part: float = _setting(1.0, "the part of the steps with mtp_weight")
    index_weight: float = _setting(
        1.0, "of the loss of the indexers, whose gradient reaches only them"
    )
    balance_weight: float = _setting(0.0, "of the experts' imbalance within sequences")
    z_weight: float = _setting(0.0, "of the square of the scores' log-sum-exp")
    balance_rate: float = _setting(1e-3, "by which the routers' biases move in a step")
    balance_part: float = _setting(1.0, "the part of the steps after which they stay")
    average_decay: float = _setting(
        0.0, "of a moving average of the weights, saved beside them; 0: none"
    )
    spike: float = _setting(
        6.0,
        "standard deviations above its mean at which a loss or norm of gradients has the step "
        "skipped; 0: only where it is not finite",
    )
    most_skipped: int = _setting(10, "steps skipped in a row that end the run", may_change=True)
    dtype: str = _setting(
        "float32",
        "that steps compute in, of which accelerators multiply float32 in fewer bits by default; "
        "weights and optimizer stay in float32",
        choices=("float32", "bfloat16"),
    )
    microbatches: int = _setting(
        1, "parts of a batch, each device's rows divided, computed one by one", may_change=True
    )
    remat: str = _setting(
        "none",
        "what is computed twice so as not to be kept in memory: none; layers, all but their "
        "inputs; products, all but their inputs and matrix products",
        may_change=True,
        choices=("none", "layers", "products"),
    )
    seed: int = _setting(0, "of the initial weights and of the order of the data")
    eval_every: int = _setting(100, "steps between evaluations", may_change=True)
    eval_rows: int = _setting(64, "rows of held-out text in an evaluation", may_change=True)
    save_every: int = _setting(500, "steps between checkpoints", may_change=True)
    keep: int = _setting(
        2, "checkpoints that are kept, the newest; so is the last of every stage", may_change=True
    )
    tensorboard: bool = _setting(
        False, "whether numbers are written to RUN/tensorboard too", may_change=True
    )
    wandb: str = _setting(
        "", "project of Weights & Biases that numbers are sent to; empty: none", may_change=True
    )
    profile: str = _setting(
        "",
        "steps whose trace for xprof is written to RUN/profile, like 10-12, up to the end of their "
        "stage at most; empty: none",
        may_change=True,
    )

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "microbatches", "eval_every", "eval_rows", "save_every")
        for name in (*counts, "keep", "most_skipped"):
            _require(getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("learning_rate", "clip"):
            _require(getattr(self, name) > 0, self, name, "more than 0: nothing would be learnt")
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices is not None:
                _require(value in choices, self, field.name, f"one of {', '.join(choices)}")
                continue
            if isinstance(value, (str, bool)):
                continue
            _require(value >= 0, self, field.name, "at least 0")
            if isinstance(field.default, float):
                _require(value < _FLOAT32_END, self, field.name, f"less than {_FLOAT32_END:.2g}")
            elif field.name != "seed":
                _require(value < _INT32_END, self, field.name, f"less than {_INT32_END}")
        _require(0 < self.decay_part <= 1, self, "decay_part", "more than 0 and at most 1")
        for name in ("mtp_weight_part", "balance_part"):
            _require(getattr(self, name) <= 1, self, name, "from 0 to 1")
        self.mixture_weights()  # says what is wrong with it
        self.profiled()
        _require(self.average_decay < 1, self, "average_decay", "less than 1")
        _require(
            self.batch_size in {self.smallest_batch << doublings for doublings in range(64)},
            self,
            "first_batch_size",
            f"the batch_size {self.batch_size} halved any number of times, or 0",
        )
        _require(
            bool(self.first_batch_size) == bool(self.batch_warmup_steps),
            self,
            "batch_warmup_steps",
            "more than 0 with first_batch_size, and 0 without",
        )
        _require(
            self.mtp_weight_part == 1 or bool(self.mtp_weight) == bool(self.final_mtp_weight),
            self,
            "final_mtp_weight",
            "0 if mtp_weight is 0, and else more: what learns does so in the whole stage",
        )
        _require(
            self.final_learning_rate <= self.learning_rate,
            self,
            "final_learning_rate",
            f"at most the learning_rate {self.learning_rate}",
        )
        _require(self.seed <= LARGEST_SEED, self, "seed", f"less than {LARGEST_SEED + 1}")
        _require(
            self.length > 1 + self.mtp_depth,
            self,
            "length",
            f"more than 1 + mtp_depth, {1 + self.mtp_depth}",
        )
        _require(
            self.stage != "warmup" or self.index_weight > 0,
            self,
            "index_weight",
            "more than 0 in the stage warmup: nothing would be learnt",
        )

    def mixture_weights(self) -> dict[str, float] | None:
        """The mixture by source; None if all rows are alike."""
        expected = "NAME=WEIGHT,NAME=WEIGHT with numbers of at least 0, one of them above"
        weights: dict[str, float] = {}
        for part in self.mixture.split(",") if self.mixture else ():
            name, equals, number = (word.strip() for word in part.partition("="))
            try:
                weight = float(number)
            except ValueError:
                weight = -1.0
            is_new = bool(name and equals) and name not in weights
            _require(is_new and 0 <= weight < _FLOAT32_END, self, "mixture", expected)
            weights[name] = weight
        _require(not weights or sum(weights.values()) > 0, self, "mixture", expected)
        return weights or None

    def profiled(self) -> range:
        """The steps whose trace is written."""
        if not self.profile:
            return range(0)
        first, _, last = self.profile.partition("-")
        ends = [int(part) if part.isdecimal() else 0 for part in (first, last)]
        is_range = 1 <= ends[0] <= ends[1]
        _require(is_range, self, "profile", "FIRST-LAST, the numbers of two steps in order")
        return range(ends[0], ends[1] + 1)

    @property
    def smallest_batch(self) -> int:
        """Rows in the first batches."""
        return self.first_batch_size or self.batch_size


def _require(holds: bool, settings: Settings, name: str, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} is {getattr(settings, name)}, expected {expected}")
