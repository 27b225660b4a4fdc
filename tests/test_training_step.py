import json
import math

import numpy as np
import pytest

from benchmarks import maxtext_step, training_step
from benchmarks.arguments import run
from benchmarks.contest import Lap, Result
from glm5_jax.config_json import parse_config
from glm5_jax.errors import InputError
from tests.tiny import TINY

CONFIG = parse_config(
    TINY | {"num_hidden_layers": 1, "mlp_layer_types": ["sparse"], "indexer_types": ["full"]}
).config


@pytest.mark.standard_promotion  # of optax
def test_a_step_learns_as_from_scratch():
    program = training_step.make(CONFIG, 24, training_step._ALL, "layers")
    losses = [program.output()[0] for _ in range(60)]  # of one text again and again
    assert losses[0] == pytest.approx(math.log(CONFIG.vocab_size), abs=0.2)
    assert losses[-1] < losses[0] - 0.5


@pytest.fixture
def turns(monkeypatch):
    """Programs that need not run: by name, how long they take; the first loss of all."""
    seconds: dict[str, float] = {}
    loss = [math.log(training_step.config().vocab_size)]

    def take_turns(makers, rounds, lap_seconds, *, with_peaks, huge_pages):
        assert huge_pages
        return {
            name: Result([Lap(time, 2 * time)] * rounds, 0.0, np.array(loss), 1e9 * with_peaks)
            for name in makers
            for time in [next((s for part, s in seconds.items() if part in name), 4.0)]
        }

    monkeypatch.setattr(training_step, "take_turns", take_turns)
    monkeypatch.setattr(maxtext_step, "is_installed", lambda: True)
    return seconds, loss


def test_what_parts_cost_is_told(turns, tmp_path, capsys):
    turns[0]["MTP"] = 5.0
    assert training_step.main(["--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "MTP 25%, the indexers' loss 0%, both 25%" in said and "MaxText" not in said
    rows = json.loads((tmp_path / "training_step.json").read_text())["rows"]
    assert [row["contest"] for row in rows] == ["parts"] * 4 + ["recomputing"] * 3
    assert {row["tokens_per_cpu_second"] for row in rows} == {256.0, 204.8}


@pytest.mark.parametrize(("slow", "status"), [(17.0, 0), (15.0, 3)])
def test_maxtext_is_compared_with_at_its_fastest(turns, slow, status, capsys):
    turns[0].update({"inexact": slow, "MaxText": 99.0})
    assert training_step.main(["--maxtext"]) == status
    assert f"fastest: {slow / 4:.1f} (goal 4)" in capsys.readouterr().out


def test_maxtexts_rows_are_not_lost_by_a_run_without_it(turns, tmp_path):
    before = json.dumps({"rows": [{"contest": "parts"}, {"contest": "MaxText"}]})
    (tmp_path / "training_step.json").write_text(before)
    with pytest.raises(InputError, match="MaxText's rows there would be lost, expected --maxtext"):
        training_step.main(["--results", str(tmp_path)])
    assert (tmp_path / "training_step.json").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "loss", "why"),
    [
        (["--maxtext"], 10.4, "--maxtext: it is not installed here; benchmarks/maxtext_step.py"),
        ([], 0.0, "here: a loss of 0.000 is not that of guessing"),
        ([], math.nan, "here: a loss of nan is not that of guessing"),
        (["--repeats", "0"], 10.4, "argument --repeats: is '0', expected"),
    ],
)
def test_what_cannot_be_measured_is_one_line(turns, arguments, loss, why, monkeypatch, capsys):
    monkeypatch.setattr(maxtext_step, "is_installed", lambda: False)
    turns[1][0] = loss
    monkeypatch.setattr("sys.argv", ["training_step", *arguments])
    with pytest.raises(SystemExit) as end:
        run(training_step.main)
    said = capsys.readouterr().err
    assert end.value.code == 2 and why in said and said.count("\n") == 1


def test_maxtext_is_given_the_same_sizes():
    sizes = maxtext_step._sizes(training_step.config())
    expected = {
        "base_emb_dim": 512,
        "base_num_query_heads": 8,
        "base_mlp_dim": 1536,
        "base_moe_mlp_dim": 256,
        "base_num_decoder_layers": 8,
        "first_num_dense_layers": 1,
        "vocab_size": 32768,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "q_lora_rank": 256,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "indexer_n_heads": 4,
        "indexer_head_dim": 64,
        "indexer_topk": 512,
    }
    assert {name: sizes[name] for name in expected} == expected
