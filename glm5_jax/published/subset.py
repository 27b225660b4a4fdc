"""A part of a published checkpoint seen as a smaller one: some layers, and some of their experts.

Only what headers and the config say is changed: tensors are left out or renumbered, and of a
router the first rows are kept.
"""

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from glm5_jax.config import Config, MoeConfig
from glm5_jax.config_json import PublishedConfig, config_to_json, parse_config
from glm5_jax.console import notice
from glm5_jax.errors import InputError
from glm5_jax.published.header import TensorInfo
from glm5_jax.published.names import BLOCK_NAMES, layer_prefix
from glm5_jax.remote import AnyPath

_NUMBER = r"(0|[1-9]\d{0,5})"
_LAYER = re.compile(rf"(?:.*?\.)??layers\.{_NUMBER}\.(.+)")
_MODULE = re.compile(rf"((?:.*?\.)??layers\.){_NUMBER}((?:\..+)?)")
_EXPERT = re.compile(rf"mlp\.experts\.{_NUMBER}\..+")
_ROUTER = (BLOCK_NAMES["mlp.router.weight"], BLOCK_NAMES["mlp.router.bias"])


class Subset(NamedTuple):
    """Which part of a checkpoint is meant."""

    layers: tuple[int, ...] | None = None  # ascending, the one after the last being MTP's; or all
    num_experts: int | None = None  # the first ones of each MoE layer; or all

    def wants(self, name: str) -> bool:
        """Whether a tensor holds some of it, by its published name or another that it may have."""
        match = _LAYER.fullmatch(name)
        if match is None:
            return True
        expert = _EXPERT.fullmatch(match[2])
        return (self.layers is None or int(match[1]) in self.layers) and (
            self.num_experts is None or expert is None or int(expert[1]) < self.num_experts
        )

    def kept(self, config: Config) -> tuple[int, ...]:
        """The layers, MTP's among them, by their numbers in the source."""
        if self.layers is None:
            return tuple(range(config.num_layers + config.num_mtp_layers))
        return self.layers

    def options(self) -> dict[str, Any]:
        """It as it is asked for on the command line."""
        layers = None if self.layers is None else ranges(self.layers)
        found = {"layers": layers, "experts": self.num_experts}
        return {name: value for name, value in found.items() if value is not None}


WHOLE = Subset()


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers in short: 0-3,78."""
    runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    lists = [[number for _, number in run] for _, run in runs]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in lists)


def subset_config(
    directory: AnyPath, published: PublishedConfig, subset: Subset
) -> PublishedConfig:
    """The config of a subset: the source's own keys, but for those that layers or experts change.

    Raises:
      InputError: the model lacks layers or experts, or some are kept without what they depend on.
        All cases are named.
    """
    config, kept = published.config, subset.kept(published.config)
    faults = [*_layer_faults(config, kept), *_expert_faults(config.moe, subset.num_experts)]
    if faults:
        raise InputError(f"{directory}: {'; '.join(faults)}")
    moe = _first_experts(config.moe, subset.num_experts or config.moe.num_experts)
    if moe.experts_per_token < config.moe.experts_per_token:
        notice(
            f"{directory}: num_experts_per_tok becomes {moe.experts_per_token}, not "
            f"{config.moe.experts_per_token}, as there are no more to choose from"
        )
    layers = [layer for layer in kept if layer < config.num_layers]
    part = dataclasses.replace(
        config,
        layers=tuple(config.layers[layer] for layer in layers),
        moe=moe,
        num_mtp_layers=len(kept) - len(layers),
    )
    found = parse_config(_changed_keys(published, part, kept))
    assert found.config == part
    return found


def _layer_faults(config: Config, kept: tuple[int, ...]) -> Iterator[str]:
    last = config.num_layers - 1
    if missing := [layer for layer in kept if layer > last + config.num_mtp_layers]:
        mtp = f", and {last + 1} for multi-token prediction" if config.num_mtp_layers else ""
        yield f"has no layers {ranges(missing)}, expected some of 0-{last}{mtp}"
    if not any(layer <= last for layer in kept):
        yield f"expected some of the layers 0-{last} in --layers"
    selecting = 0
    left_alone: dict[int, list[int]] = defaultdict(list)
    for layer, kind in enumerate(config.layers):
        selecting = layer if kind.indexer == "full" else selecting
        if layer in kept and selecting not in kept:
            left_alone[selecting].append(layer)
    for selecting, layers in left_alone.items():
        yield (
            f"layers {ranges(layers)} share the selection of layer {selecting}, expected it in "
            "--layers, too"
        )


def _expert_faults(moe: MoeConfig, count: int | None) -> Iterator[str]:
    group = moe.num_experts // moe.num_groups
    if count is None:
        return
    if count > moe.num_experts:
        yield f"has {moe.num_experts} experts, expected at most as many in --experts, not {count}"
    elif moe.num_groups > 1 and count % group:
        yield f"has groups of {group} experts, expected whole ones in --experts, not {count}"


def _first_experts(moe: MoeConfig, count: int) -> MoeConfig:
    """Experts that are chosen in groups are kept in the same groups."""
    group = moe.num_experts // moe.num_groups if moe.num_groups > 1 else count
    groups = count // group
    groups_per_token = min(moe.groups_per_token, groups)
    return dataclasses.replace(
        moe,
        num_experts=count,
        num_groups=groups,
        groups_per_token=groups_per_token,
        experts_per_token=min(moe.experts_per_token, groups_per_token * group),
    )


def _changed_keys(
    published: PublishedConfig, part: Config, kept: tuple[int, ...]
) -> dict[str, Any]:
    """The object of a subset's `config.json`.

    What varies by layer is listed layer by layer, as no frequency or count may say it any more.
    """
    before, after = config_to_json(published.config), config_to_json(part)
    raw = published.raw | {key: after[key] for key in after if after[key] != before[key]}
    for alias in ("num_experts", "num_local_experts"):
        if raw.get(alias) is not None:
            raw[alias] = part.moe.num_experts
    if part.layers == published.config.layers:
        return raw
    for key in ("index_topk_freq", "index_skip_topk_offset", "index_topk_pattern"):
        raw.pop(key, None)
    if raw.get("layer_types") is not None:
        raw["layer_types"] = [raw["layer_types"][layer] for layer in kept[: part.num_layers]]
    if raw.get("quantization_config") is not None:
        raw["quantization_config"] = {
            key: list(_renumbered(value, kept)) if isinstance(value, list) else value
            for key, value in raw["quantization_config"].items()
        }
    # For readers that know no list. Where dense layers follow others, only the list says so.
    dense = itertools.takewhile(lambda kind: kind.mlp == "dense", part.layers)
    return raw | {"first_k_dense_replace": len(list(dense))}


def _renumbered(modules: list[Any], kept: tuple[int, ...]) -> Iterator[Any]:
    """The modules that a list names, such as those that are not float8, under their new numbers."""
    for module in modules:
        match = _MODULE.fullmatch(module) if isinstance(module, str) else None
        if match is None:
            yield module
        elif int(match[2]) in kept:
            yield f"{match[1]}{kept.index(int(match[2]))}{match[3]}"


def subset_tensors(
    tensors: Mapping[str, TensorInfo], config: Config, subset: Subset
) -> dict[str, TensorInfo]:
    """The tensors of a subset, of those that a file of the whole checkpoint has.

    Args:
      tensors: by their published names.
      config: of the whole checkpoint.
    """
    numbers = {old: new for new, old in enumerate(subset.kept(config))}
    experts = subset.num_experts or config.moe.num_experts
    found = {}
    for name, info in tensors.items():
        if not subset.wants(name):
            continue
        if match := _LAYER.fullmatch(name):
            layer, rest = int(match[1]), match[2]
            name = layer_prefix(numbers.get(layer, layer)) + rest  # or one that the model lacks
            if rest in _ROUTER and info.shape[:1] == (config.moe.num_experts,):
                info = info._replace(shape=(experts, *info.shape[1:]))
        found[name] = info
    return found
