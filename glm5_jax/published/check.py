"""Whether the tensors of a published checkpoint are those its config demands."""

from collections.abc import Iterable, Mapping

from glm5_jax.config import Config
from glm5_jax.published.families import by_family
from glm5_jax.published.fp8 import SCALE_SUFFIX, scale_shape
from glm5_jax.published.header import TensorInfo
from glm5_jax.published.names import PublishedTensor, published_tensors
from glm5_jax.published.tensor_file import DTYPES, FLOAT8


def tensor_problems(
    config: Config, infos: Mapping[str, TensorInfo], copies: Mapping[str, str]
) -> list[str]:
    """Every way in which tensors differ from what a config demands.

    Args:
      infos: what the headers say of each tensor, scales included.
      copies: tensors that are allowed as copies of others: name -> name of the original.

    Returns:
      One phrase per fault; tensors of one fault whose names differ only in numbers share one.
    """
    expected = {tensor.name: tensor for tensor in published_tensors(config)}
    for name, original in copies.items():
        expected[name] = expected[original]._replace(name=name)
    scales = {
        name + SCALE_SUFFIX for name in expected if name in infos and infos[name].dtype == FLOAT8
    }
    faults = [(name, "is missing") for name in expected if name not in infos]
    known = expected.keys() | scales
    faults += [(name, "is unknown") for name in infos if name not in known]
    for name, tensor in expected.items():
        if name in infos:
            faults += [(name, fault) for fault in _faults(tensor, infos)]
    faults += _mixed(expected.values(), infos)
    return [f"{subject} {fault}" for subject, fault, _ in by_family(faults)]


def _faults(tensor: PublishedTensor, infos: Mapping[str, TensorInfo]) -> Iterable[str]:
    info = infos[tensor.name]
    if info.shape != tensor.shape:
        yield f"has shape {list(info.shape)}, expected {list(tensor.shape)}"
    if info.dtype not in DTYPES:
        yield f"has dtype {info.dtype}, expected one of {', '.join(DTYPES)}"
    if info.dtype != FLOAT8:
        return
    if len(info.shape) != 2:
        yield f"has dtype {FLOAT8}, which only matrices may have"
        return
    scale = infos.get(tensor.name + SCALE_SUFFIX)
    if scale is None:
        yield f"has dtype {FLOAT8} but no {SCALE_SUFFIX} tensor beside it"
    elif scale.dtype != "F32" or scale.shape != scale_shape(info.shape):
        yield (
            f"has {scale.dtype} scales of shape {list(scale.shape)}, expected F32 of "
            f"{list(scale_shape(info.shape))}"
        )


def _mixed(
    tensors: Iterable[PublishedTensor], infos: Mapping[str, TensorInfo]
) -> Iterable[tuple[str, str]]:
    """Tensors that cannot be stacked with the others of their leaf, being of another dtype.

    Float8 goes with any dtype: it is read as the dtype of the checkpoint's other weights.
    """
    first: dict[str, str] = {}
    for tensor in tensors:
        info = infos.get(tensor.name)
        if info is None or info.dtype == FLOAT8:
            continue
        dtype = first.setdefault(tensor.leaf, info.dtype)
        if info.dtype != dtype:
            yield tensor.name, f"has dtype {info.dtype}, expected {dtype} as in other layers"
