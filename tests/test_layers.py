import hypothesis
import hypothesis.strategies as st

from glm5_jax.layers import LayerKind, group_layers, layer_places
from glm5_jax.presets import load_preset

D, F, S = LayerKind("dense", "full"), LayerKind("moe", "full"), LayerKind("moe", "shared")


def test_glm5_is_three_dense_and_75_moe_layers():
    segments = load_preset("glm-5").config.segments
    assert [(segment.unit, segment.count) for segment in segments] == [((D,), 3), ((F,), 75)]


def test_glm52_ends_in_18_groups_of_one_full_and_three_shared_layers():
    segments = load_preset("glm-5.2").config.segments
    assert [(segment.unit, segment.count) for segment in segments] == [
        ((D,), 3),
        ((S,), 3),
        ((F, S, S, S), 18),
    ]


@hypothesis.given(st.lists(st.sampled_from([D, F, S]), min_size=1, max_size=24).map(tuple))
def test_segments_hold_every_layer_once_and_in_order(kinds):
    segments = group_layers(kinds)
    places = layer_places(segments)
    assert len(set(places)) == len(kinds)
    assert tuple(segments[place.segment].unit[place.slot] for place in places) == kinds
    order = [(place.segment, place.group, place.slot) for place in places]
    assert order == sorted(order)


@hypothesis.given(
    st.lists(st.sampled_from([D, F, S]), min_size=1, max_size=4).map(tuple),
    st.integers(2, 12),
)
def test_more_groups_need_no_more_layer_bodies(unit, count):
    bodies = [sum(len(s.unit) for s in group_layers(unit * n)) for n in (count, count + 7)]
    assert bodies[0] == bodies[1] <= len(unit)
