"""What a training step is compared with: MaxText's DeepSeek-V3.2, the nearest that it has.

It needs an environment with Python 3.12 or newer that has this project and MaxText 0.2.5, whose own
requirements bring CUDA or libtpu; on a CPU these do:

    pip install --no-deps maxtext==0.2.5
    pip install absl-py aqtp datasets drjax gcsfs grain jinja2 ml-collections ml-goodput-measurement
      omegaconf pathwaysutils pillow psutil pydantic pyyaml qwix sentencepiece sympy tensorboardX
      tiktoken tokamax tokenizers transformers
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contest import Program
from glm5_jax.config import Config

# Its experts as ragged products, its default, or all experts of every token; its indexers may
# select a little more than they should; and it may recompute less than whole layers, or, of layers
# that are not scanned, nothing.
_DENSE = {"sparse_matmul": False}
_INEXACT = _DENSE | {"indexer_mask_exact_topk": False}
SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("MaxText, ragged experts", "layers"): {},
    ("MaxText, all experts", "layers"): _DENSE,
    ("MaxText, all experts, inexact selection", "layers"): _INEXACT,
    ("MaxText, all experts, inexact selection", "little"): _INEXACT | {"remat_policy": "minimal"},
    ("MaxText, all experts, inexact selection", "none"): _INEXACT
    | {"remat_policy": "none", "scan_layers": False},
}


def is_installed() -> bool:
    """Whether MaxText can be imported here."""
    return find_spec("maxtext") is not None


def make(config: Config, length: int, setting: dict[str, Any]) -> Program:
    """A `contest.Maker`: one step that learns a row of random tokens; the output is their loss."""
    import jax
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train import train
    from maxtext.utils import sharding, train_utils

    base = str(Path(pyconfig.__file__).with_name("base.yml"))
    options = _sizes(config) | setting | {"max_target_length": length}
    settings = pyconfig.initialize(["", base], **options)
    _, _, shardings, _, mesh, _, _, loader, _, _, state = train_utils.setup_train_loop(
        settings, None
    )
    graph, state = nnx.split(state)
    param_shardings, shardings = sharding.maybe_update_params_sharding_with_opt(settings, shardings)
    step, _ = train_utils.jit_train_and_eval_step(
        settings,
        graph,
        mesh,
        state,
        shardings,
        train.train_step,
        params_shardings=param_shardings,
    )
    states = [state]

    def run() -> np.ndarray:
        with jax.set_mesh(mesh), logical_axis_rules(settings.logical_axis_rules):
            state, metrics = step(states.pop(), loader.load_next_batch())
            states.append(jax.block_until_ready(state))
        return np.array([metrics["scalar"]["learning/lm_loss"]])

    return Program(run, run)


def _sizes(config: Config) -> dict[str, Any]:
    """MaxText's names of the same sizes, and a step in float32 of all that ours has but MTP."""
    mla, moe, indexer = config.mla, config.moe, config.indexer
    return {
        "model_name": "deepseek3.2-671b",
        "override_model_config": True,
        "base_emb_dim": config.dim,
        "base_num_query_heads": mla.num_heads,
        "base_num_kv_heads": mla.num_heads,
        "base_mlp_dim": config.dense_ffn,
        "base_moe_mlp_dim": moe.ffn,
        "base_num_decoder_layers": config.num_layers,
        "first_num_dense_layers": sum(kind.mlp == "dense" for kind in config.layers),
        "vocab_size": config.vocab_size,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "shared_experts": moe.num_shared_experts,
        "q_lora_rank": mla.q_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_nope_head_dim": mla.nope_dim,
        "qk_rope_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
        "indexer_n_heads": indexer.num_heads,
        "indexer_head_dim": indexer.head_dim,
        "indexer_topk": indexer.topk,
        # Without sparse training it learns nothing but indexers, and drops the rest of the step.
        "indexer_sparse_training": True,
        "indexer_loss_scaling_factor": 1.0,
        "rope_type": "default",
        "rope_max_timescale": round(config.rope_theta),
        "dtype": "float32",
        "weight_dtype": "float32",
        "attention": "dot_product",
        "per_device_batch_size": 1,
        "steps": 1000,
        "dataset_type": "synthetic",
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "enable_checkpointing": False,
        "enable_tensorboard": False,
        "enable_goodput_recording": False,
        "log_config": False,
        "run_name": "step",
        "base_output_directory": "build/benchmarks/maxtext",
    }
