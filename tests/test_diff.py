"""What differs between two checkpoints, whatever their layouts."""

import numpy as np
import pytest

from convert.__main__ import main
from tests.tiny import (
    TINY,
    WIDE,
    float8_weights,
    random_weights,
    write_published,
)


def test_diff_of_equal_checkpoints_is_empty_whatever_their_layout(tmp_path, capsys):
    source = write_published(tmp_path / "source", TINY, random_weights(TINY), num_shards=2)
    native, back = tmp_path / "native", tmp_path / "back"
    assert main(["from-hf", str(source), str(native)]) == 0
    assert main(["to-hf", str(native), str(back)]) == 0
    for first, second in ((source, back), (source, native), (native, back), (native, native)):
        assert main(["diff", str(first), str(second)]) == 0
    assert "0 differences, largest between values 0" in capsys.readouterr().out


def test_diff_names_what_differs(tmp_path, capsys):
    weights = random_weights(TINY)
    first = write_published(tmp_path / "first", TINY, weights)
    changed = {n: w.copy() for n, w in weights.items() if not n.startswith("model.layers.7.")}
    changed["model.norm.weight"][7] += 0.25
    changed["lm_head.weight"][3, 4] = np.nan
    changed["model.layers.1.mlp.up_proj.weight"] = (
        weights["model.layers.1.mlp.up_proj.weight"].astype(np.float64).astype(np.float32)
    )
    second = write_published(tmp_path / "second", TINY, changed)
    assert main(["diff", str(first), str(second)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "model.norm.weight: values by up to 0.25" in lines
    assert "lm_head.weight: values by up to inf" in lines
    assert f"model.layers.7.enorm.weight: only in {first}" in lines
    assert not any("up_proj" in line and "layers.1." in line for line in lines)


def test_diff_puts_many_of_a_kind_in_a_line(tmp_path, capsys):
    weights = random_weights(TINY)
    first = write_published(tmp_path / "first", TINY, weights)
    changed = dict(weights)
    for expert in range(8):
        name = f"model.layers.4.mlp.experts.{expert}.up_proj.weight"
        changed[name] = weights[name] + np.float32(expert)
    second = write_published(tmp_path / "second", TINY | {"rms_norm_eps": 1e-6}, changed)
    assert main(["diff", str(first), str(second)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "config.json, rms_norm_eps: 1e-05 and 1e-06"
    assert "(7 tensors, such as model.layers.4.mlp.experts.1.up_proj.weight)" in lines[1]
    assert lines[1].endswith(": values by up to 7") and "8 differences" in lines[2]


@pytest.mark.filterwarnings("error")
def test_diff_tells_infinities_and_signs_of_zero_apart(tmp_path, capsys):
    weights = {name: w.copy() for name, w in random_weights(TINY).items()}
    weights["model.norm.weight"][:3] = np.inf, np.inf, 0.0
    weights["lm_head.weight"][0, 0] = 0.0
    first = write_published(tmp_path / "first", TINY, weights)
    changed = {name: w.copy() for name, w in weights.items()}
    changed["model.norm.weight"][1] = 1.0
    changed["lm_head.weight"][0, 0] = -0.0
    second = write_published(tmp_path / "second", TINY, changed)
    assert main(["diff", str(first), str(second)]) == 1
    assert {*capsys.readouterr().out.splitlines()[:2]} == {
        "model.norm.weight: values by up to inf",
        "lm_head.weight: equal values in other bits",
    }


def test_float8_does_not_differ_from_what_it_is_converted_to(tmp_path, capsys):
    raw = WIDE | {"dtype": "bfloat16"}
    published, _ = float8_weights(random_weights(raw))
    source = write_published(tmp_path / "source", raw, published)
    assert main(["from-hf", str(source), str(tmp_path / "native")]) == 0
    assert main(["diff", str(source), str(tmp_path / "native")]) == 0
    assert main(["diff", str(tmp_path / "native"), str(source)]) == 0
