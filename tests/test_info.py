import json

import pytest

from glm5_jax.__main__ import main
from glm5_jax.info import describe
from glm5_jax.presets import load_preset
from tests.tiny import TINY, random_weights, write_published


@pytest.mark.parametrize(
    ("name", "active", "weight_bytes", "cache_bytes"),
    [
        ("glm-5", 40_833_126_912, 1_507_728_316_928, 109_824),
        ("glm-5.2", 40_298_928_384, 1_506_659_919_872, 95_232),
    ],
)
def test_derived_sizes_are_the_published_ones(name, active, weight_bytes, cache_bytes):
    facts = describe(load_preset(name).config)
    # the published count of active parameters leaves out the router biases
    assert facts["active parameters"] == active + 75 * 256
    assert facts["weight bytes"] == weight_bytes
    assert facts["cache bytes per token"] == cache_bytes


@pytest.mark.parametrize("name", ["glm-5", "glm-5.2", "bench-shared"])
def test_parts_add_up_to_the_whole(name):
    parameters = describe(load_preset(name).config)["parameters"]
    total, without_mtp, *parts = parameters.values()
    assert sum(parts) == without_mtp < total


def test_presets_and_directories_are_described(tmp_path, capsys):
    assert main(["info", "glm-5.3"]) == 0
    assert "18 x (1 moe with full indexer + 3 moe with shared indexer)" in capsys.readouterr().out
    directory = write_published(tmp_path, TINY | {"novelty": 1}, random_weights(TINY))
    assert main(["info", str(directory), "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["num_layers"] == 7
    assert "novelty" in output.err


def test_an_unknown_name_lists_the_presets(capsys):
    assert main(["info", "glm-6"]) == 2
    assert "glm-5.2" in capsys.readouterr().err
