"""What a run does with its model and data: every key, its default and its meaning."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from glm5_jax.errors import InputError
from glm5_jax.inference.request import LARGEST_SEED

_FLOAT32_END = 2.0**128  # training computes in float32, where this is infinity


def _setting(
    default: Any, meaning: str, *, may_change: bool = False, choices: Sequence[str] | None = None
) -> Any:
    """Declares a setting; it may change when a run goes on if it has no part in what is learnt."""
    metadata = {"help": meaning, "may_change": may_change, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run. The command line has an option for each."""

    steps: int = _setting(1000, "steps to take in all")
    batch_size: int = _setting(16, "rows in a batch")
    length: int = _setting(256, "tokens in a row")
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
    stage: str = _setting(
        "sparse",
        "what is learnt: dense, the model, attending to all tokens; warmup, only the indexers, "
        "from that attention and no other loss; sparse, all, attending to the tokens that "
        "indexers select",
        choices=("dense", "warmup", "sparse"),
    )
    mtp_depth: int = _setting(1, "tokens further ahead than the next that are learnt")
    mtp_weight: float = _setting(0.3, "of the loss of tokens further ahead")
    index_weight: float = _setting(1.0, "of the loss of the indexers, which moves only them")
    balance_weight: float = _setting(0.0, "of the experts' imbalance within sequences")
    z_weight: float = _setting(0.0, "of the square of the scores' log-sum-exp")
    balance_rate: float = _setting(1e-3, "by which the routers' biases move in a step")
    dtype: str = _setting(
        "float32",
        "that steps compute in; weights and optimizer stay in float32",
        choices=("float32", "bfloat16"),
    )
    microbatches: int = _setting(
        1, "parts of a batch, each device's rows divided, computed one by one", may_change=True
    )
    remat: bool = _setting(
        False, "compute layers twice and keep less of them in memory", may_change=True
    )
    seed: int = _setting(0, "of the initial weights and of the order of the data")
    eval_every: int = _setting(100, "steps between evaluations", may_change=True)
    eval_rows: int = _setting(64, "rows of held-out text in an evaluation", may_change=True)
    save_every: int = _setting(500, "steps between checkpoints", may_change=True)
    keep: int = _setting(2, "checkpoints that are kept, the newest", may_change=True)

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "microbatches", "eval_every", "eval_rows", "save_every")
        for name in (*counts, "keep"):
            _require(getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("learning_rate", "clip"):
            _require(getattr(self, name) > 0, self, name, "more than 0: nothing would be learnt")
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices is not None:
                _require(value in choices, self, field.name, f"one of {', '.join(choices)}")
                continue
            _require(value >= 0, self, field.name, "at least 0")
            if isinstance(field.default, float):
                _require(value < _FLOAT32_END, self, field.name, f"less than {_FLOAT32_END:.2g}")
        _require(0 < self.decay_part <= 1, self, "decay_part", "more than 0 and at most 1")
        _require(
            self.final_learning_rate <= self.learning_rate,
            self,
            "final_learning_rate",
            f"at most the learning_rate {self.learning_rate}",
        )
        _require(self.seed <= LARGEST_SEED, self, "seed", f"less than {LARGEST_SEED + 1}")
        _require(self.length > 1 + self.mtp_depth, self, "length", "more than 1 + mtp_depth")
        _require(
            self.stage != "warmup" or self.index_weight > 0,
            self,
            "index_weight",
            "more than 0 in the stage warmup: nothing would be learnt",
        )

    def lasting(self) -> dict[str, Any]:
        """The settings that are the same from the first step of a run to the last."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if not field.metadata["may_change"]
        }


def _require(holds: bool, settings: Settings, name: str, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} is {getattr(settings, name)}, expected {expected}")
