"""The published constants of accelerators."""

import dataclasses

import pytest

from glm5_jax.plan.chips import CHIPS, GIB

every_chip = pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)


def test_the_table_has_the_chips_that_are_planned_for():
    assert list(CHIPS) == ["v4", "v5e", "v5p", "v6e", "v7", "h100", "h200", "b200"]
    assert all(name == chip.name for name, chip in CHIPS.items())


@every_chip
def test_every_chip_has_every_constant(chip):
    assert chip.devices in (1, 2)
    for field in dataclasses.fields(chip):
        assert getattr(chip, field.name), f"{chip.name}: no {field.name}"
    assert {"bfloat16", "float32", "float32_highest"} <= chip.flops.keys()
    assert all(url.startswith("https://") for url in chip.source)


@every_chip
def test_constants_have_the_order_of_their_kinds(chip):
    assert 0.9 * chip.hbm_bytes < chip.usable_hbm_bytes < chip.hbm_bytes
    assert chip.hbm_bandwidth > chip.link_bandwidth > chip.network_bandwidth
    assert chip.flops["bfloat16"] >= chip.flops["float32"] > chip.flops["float32_highest"]
    assert chip.flops.get("float8", chip.flops["bfloat16"]) >= chip.flops["bfloat16"]
    # Products of some hundred rows are where every chip turns from memory to arithmetic.
    assert 150 < chip.flops["bfloat16"] / chip.hbm_bandwidth < 600


@pytest.mark.parametrize(
    ("less", "more"),
    [("v5e", "v5p"), ("v4", "v5p"), ("v5e", "v6e"), ("v5p", "v7"), ("h200", "b200")],
)
def test_a_better_chip_is_better_in_every_way(less, more):
    one, other = CHIPS[less], CHIPS[more]
    assert one.hbm_bytes <= other.hbm_bytes
    assert all(rate < other.flops[dtype] for dtype, rate in one.flops.items())
    assert one.hbm_bandwidth < other.hbm_bandwidth
    assert one.link_bandwidth <= other.link_bandwidth
    assert one.network_bandwidth <= other.network_bandwidth


@every_chip
def test_the_devices_of_a_chip_share_it(chip):
    one = chip.per_device
    assert one.devices == 1
    assert one.per_device == one
    assert one.hbm_bytes * chip.devices == chip.hbm_bytes
    assert one.usable_hbm_bytes * chip.devices == chip.usable_hbm_bytes
    assert one.flops["bfloat16"] * chip.devices == chip.flops["bfloat16"]
    assert one.hbm_bandwidth * chip.devices == chip.hbm_bandwidth
    assert one.link_bandwidth * chip.devices == chip.link_bandwidth
    assert one.network_bandwidth * chip.devices == chip.network_bandwidth


def test_compilers_name_the_memory_of_a_device():
    """What libtpu says is available, in GiB to two places."""
    named = {"v4": 15.25, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25, "v7": 94.75}
    for name, gib in named.items():
        assert CHIPS[name].per_device.usable_hbm_bytes / GIB == pytest.approx(gib, abs=0.005)


def test_every_float8_has_the_rate_of_float8():
    assert CHIPS["v7"].rate("float8_e4m3fn") == CHIPS["v7"].rate("float8_e5m2") == 4614e12
    with pytest.raises(ValueError, match="v5e has no FLOP/s for float8_e4m3fn"):
        CHIPS["v5e"].rate("float8_e4m3fn")
