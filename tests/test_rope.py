import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.rope import rotate, rotation
from tests.reference import numpy_glm5

THETA = 1e4


def turn(positions, dim=8):
    return rotation(jnp.asarray(positions, jnp.int32)[None], dim, THETA)


@pytest.mark.parametrize("interleaved", [True, False])
def test_pairs_turn_as_complex_numbers(interleaved):
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 8)).astype(np.float32)
    positions = [0, 1, 1000]
    turned = rotate(jnp.asarray(x), turn(positions), interleaved=interleaved)
    for t, position in enumerate(positions):
        expected = numpy_glm5.rotate(x[0, t].astype(np.float64), position, THETA, interleaved)
        if interleaved:  # firsts of all pairs, then seconds
            expected = np.concatenate([expected[..., 0::2], expected[..., 1::2]], axis=-1)
        # float32 angles at position 1000 are exact to 1000 * 2^-24
        np.testing.assert_allclose(turned[0, t], expected, atol=2e-4)


@pytest.mark.parametrize("interleaved", [True, False])
def test_scores_depend_on_distance_only(interleaved):
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 8))
    scores = [
        jnp.vdot(
            rotate(query, turn([near]), interleaved=interleaved),
            rotate(key, turn([near - 5]), interleaved=interleaved),
        )
        for near in (5, 6, 50)
    ]
    np.testing.assert_allclose(scores, scores[0], atol=1e-5)


def test_rotation_keeps_lengths():
    x = jax.random.normal(jax.random.key(1), (1, 4, 8))
    turned = rotate(x, turn([0, 3, 10, 999]), interleaved=True)
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )


@pytest.mark.parametrize("theta", [1e4, 1e6, 8e6])
def test_far_tokens_turn_as_the_published_implementation_turns_them(theta):
    """At 200,000 tokens a frequency that is rounded otherwise turns by 1e-3 more or less."""
    hf = pytest.importorskip("transformers.models.glm_moe_dsa", reason="transformers is missing")
    torch = pytest.importorskip("torch", reason="PyTorch, the reference, is not installed")
    config = hf.GlmMoeDsaConfig(
        qk_rope_head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    positions = np.random.default_rng(0).integers(0, 202_752, size=500)
    expected = hf.modeling_glm_moe_dsa.GlmMoeDsaRotaryEmbedding(config)(
        torch.zeros(1), torch.from_numpy(positions)[None]
    )
    turned = rotation(jnp.asarray(positions, jnp.int32)[None], 64, theta)
    for ours, theirs in zip(turned, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy()[..., :32], atol=1e-6, rtol=0)
