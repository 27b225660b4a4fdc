import json

import pytest

from benchmarks.demo import PROMPTS, main
from glm5_jax.errors import InputError


def test_a_folder_of_another_thing_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="is not of a demo, expected a new folder"):
        main(["--folder", str(tmp_path)])
    assert (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_demo_runs_from_text_to_text(tmp_path, capfd):
    results = tmp_path / "results"
    options = ["--folder", tmp_path / "demo", "--results", results]
    options += ["--steps", 2, "--max-bytes", 1_500_000]
    assert main([str(option) for option in options]) == 0
    report = json.loads((results / "demo.json").read_text())
    assert len(report["texts"]) == len(PROMPTS)
    assert any("0 differences" in line for line in report["summary"])
    assert any("differ by 0 at most, MTP logits by 0" in line for line in report["summary"])
    assert (results / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "$ glm5-convert to-hf" in capfd.readouterr().out
