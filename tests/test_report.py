import html.parser
import json
import time

import matplotlib.image
import numpy as np
import pytest

from glm5_jax.errors import InputError
from train.history import Column, column, columns, spans
from train.metrics import to_line
from train.report import report

ALL = {"losses", "learning", "indexers", "recall", "acceptance", "experts", "speed"}


def step(number, **more):
    """What every run has said of a step from the beginning."""
    return {
        "step": number,
        "loss": 5 / number,
        "mtp_losses": [6 / number],
        "index_loss": 0.4 / number,
        "tokens_per_second": 1000.0,
    } | more


def staged(number, stage, mtp_depth):
    """All that a step can say, with an evaluation every third."""
    taught = stage != "dense"
    record = step(
        number,
        stage=stage,
        mtp_losses=[6 / number] * mtp_depth,
        index_loss=0.4 / number if taught else 0,
        index_losses=[0.3 / number, 0.5 / number] if taught else [],
        learning_rate=1e-3,
        gradient_norm=2.0,
        imbalance=1.5,
        tokens=96 * number,
        tokens_per_second_per_device=125.0,
        mfu=0.41,
    )
    if number % 3 == 0:
        record |= {"held_out_loss": 5.5 / number, "bits_per_byte": 1.25}
        record |= {"held_out_mtp_losses": [7.0] * mtp_depth, "index_recall": [0.75, 0.25]}
        record |= {"mtp_acceptance": [0.625] * mtp_depth, "expert_loads": [[0.25, 0.75], [1, 0]]}
    return record


def stages():
    plan = {"dense": 1, "warmup": 0, "sparse": 3}
    records = [
        staged(3 * place + number, stage, depth)
        for place, (stage, depth) in enumerate(plan.items())
        for number in (1, 2, 3)
    ]
    skipped = {"skipped": True, "loss": None, "mtp_losses": [None], "gradient_norm": None}
    records[1] |= skipped
    return records


def write_run(folder, records, origin=None):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(map(to_line, records)))
    if origin is not None:
        (folder / "run.json").write_text(json.dumps(origin))
    return folder


class Page(html.parser.HTMLParser):
    """The parts of a page that tests ask for."""

    def __init__(self, path):
        super().__init__()
        self.text, self.images, self.links = path.read_text(), {}, []
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [found[name] for name in ("src", "srcset", "href") if name in found]
        if tag == "img":
            self.images[found["src"]] = found


def test_a_run_of_stages_is_drawn_and_summed_up(tmp_path):
    settings = [{"stage": name, "steps": 3} for name in ("dense", "warmup", "sparse")]
    origin = {"stages": settings, "config": {"num_hidden_layers": 1}}
    run = write_run(tmp_path / "run", stages(), origin)
    lines = dict(line.split("  ", 1) for line in report(run).splitlines())
    facts = {label: value.strip() for label, value in lines.items()}
    assert facts["stages"] == "dense to step 3, warmup to step 6, sparse to step 9"
    assert facts["updates skipped"] == "1" and facts["tokens"] == "864"
    assert facts["loss"] == "5.000 -> 0.556 nats per token"
    assert facts["MTP loss, depth 1"] == "6.000 -> 0.667"
    assert facts["MTP loss, depth 3"] == "0.857 -> 0.667"
    assert facts["indexer divergence"] == "0.100 -> 0.044", "of the stages that teach indexers"
    assert facts["indexer recall"] == "50.0% in the mean of layers, 25.0% at least"
    assert facts["drafts accepted"] == "62.5%, 62.5%, 62.5%"
    assert facts["speed"] == "1,000 tokens/s, 125 per device, MFU 41.0%"

    page = Page(run / "report" / "index.html")
    assert facts["page"] == str(run / "report" / "index.html")
    assert set(page.images) == {f"{name}.png" for name in ALL}
    assert "25% to 75%" in page.images["recall.png"]["alt"]
    assert "0.00 to 2.00 of an even share" in page.images["experts.png"]["alt"]
    for link in page.links:
        assert link == "data:," or (run / "report" / link).exists(), "nothing from elsewhere"
    for name, image in page.images.items():
        height, width = matplotlib.image.imread(run / "report" / name).shape[:2]
        shape = int(image["width"]) / int(image["height"])
        assert width / height == pytest.approx(shape, rel=0.01) and width > 1000


def test_a_run_that_says_little_is_drawn_too(tmp_path):
    run = write_run(tmp_path / "run", [step(1)])
    text = report(run)
    assert "held-out" not in text and "divergence" not in text
    page = Page(run / "report" / "index.html")
    assert set(page.images) == {"losses.png", "speed.png"} and "no run.json" in page.text


def test_steps_that_were_all_skipped_are_drawn(tmp_path):
    nothing = {"skipped": True, "loss": None, "index_loss": None, "mtp_losses": [None]}
    nothing |= {"gradient_norm": None, "learning_rate": 1e-3}
    assert "unknown nats" in report(write_run(tmp_path / "run", [step(1, **nothing)]))


def test_pictures_of_what_is_no_longer_there_are_removed(tmp_path):
    run = write_run(tmp_path / "run", stages())
    report(run)
    report(write_run(run, [step(1)]))
    left = {path.name for path in (run / "report").iterdir()}
    drawn = {f"{name}{suffix}.png" for name in ("losses", "speed") for suffix in ("", "-dark")}
    assert left == drawn | {"index.html"}


def test_what_a_run_is_made_of_is_text_and_no_markup(tmp_path):
    origin = {"settings": {"<b>note": "<script>alert(1)</script> & $title"}, "start": "'\""}
    run = write_run(tmp_path / "<i>run&amp;", [step(1)], origin)
    report(run)
    text = (run / "report" / "index.html").read_text()
    assert "<script>" not in text and "<b>" not in text and "<i>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; $title" in text
    assert "Training run &lt;i&gt;run&amp;amp;" in text


def test_a_run_without_a_step_has_no_report(tmp_path):
    with pytest.raises(InputError, match="metrics.jsonl: holds no step yet"):
        report(write_run(tmp_path, []))
    assert not (tmp_path / "report").exists()


@pytest.mark.slow
def test_a_hundred_thousand_steps_are_drawn_in_seconds(tmp_path):
    records = [staged(1 + number, "sparse", 3) for number in range(100_000)]
    run = write_run(tmp_path / "run", records)
    began = time.perf_counter()
    report(run)
    assert time.perf_counter() - began < 60


def values(*numbers):
    return Column(np.arange(1, len(numbers) + 1), np.array(numbers, float))


def test_a_trend_is_the_mean_of_what_is_known():
    np.testing.assert_array_equal(values(1, 3, np.nan, 5).smooth().values_N, [1, 3, np.nan, 5])
    long = values(*([1.0] * 60 + [3.0] * 60))  # 3 at a time
    smooth = long.smooth().values_N
    assert list(smooth[58:63]) == pytest.approx([1, 1, 5 / 3, 7 / 3, 3])
    huge = long._replace(values_N=np.where(long.steps_N == 30, 1e18, long.values_N)).smooth()
    assert np.flatnonzero(huge.values_N != smooth).tolist() == [29, 30, 31]
    gaps = long._replace(values_N=np.where(long.steps_N % 2, long.values_N, np.nan))
    np.testing.assert_allclose(gaps.smooth().values_N[[0, 119]], [1, 3])


def test_thinning_keeps_the_ends_and_every_peak():
    many = values(*np.zeros(100_000))
    many.values_N[54_321], many.values_N[77_777] = 9, np.nan
    drawn = many.extremes()
    assert len(drawn.steps_N) <= 1500 and drawn.values_N.max() == 9
    assert np.isfinite(drawn.values_N).all() and (np.diff(drawn.steps_N) >= 0).mean() > 0.4
    thin = many.thin()
    assert len(thin.steps_N) <= 1500 and thin.steps_N[-1] == 100_000
    few = values(1, 2, 3)
    assert few.thin().steps_N.tolist() == few.extremes().steps_N.tolist() == [1, 2, 3]
    assert not len(values().thin().steps_N)


def test_columns_have_the_steps_that_say_something():
    records = stages()
    assert [(span.stage, len(span.records)) for span in spans(records)] == [
        ("dense", 3),
        ("warmup", 3),
        ("sparse", 3),
    ]
    again = [*records, *({**record, "stage_number": 4} for record in records[-2:])]
    assert [len(span.records) for span in spans(again)] == [3, 3, 3, 2]
    np.testing.assert_array_equal(column(records, "loss").values_N[:2], [5, np.nan])
    first, second, _ = columns(records, "mtp_losses")
    assert first.steps_N.tolist() == [1, 2, 3, 7, 8, 9] and second.steps_N.tolist() == [7, 8, 9]
    assert columns(records, "unknown") == [] and not len(column(records, "unknown").steps_N)
