"""Who may import whom, read from the import statements."""

import ast
import re
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("glm5_jax", "train", "convert")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

# From the bottom up: a file imports only from the lines before its own, or its own.
ORDER = [
    ["errors", "remote", "compiled"],
    ["plain_files"],
    ["strict_json", "layers", "console", "atomic", "chunks", "config_keys", "bits"],
    ["rendezvous", "cluster", "coordination", "processes", "findings", "models", "quantized"],
    ["plan.chips", "plan.costs", "plan.tally"],
    ["collectives"],
    ["config", "published.families", "published.fp8", "slots"],
    ["config_json"],
    ["presets", "params", "linear", "places", "queries"],
    ["topk", "dispatch"],
    ["mesh"],
    ["sharding"],
    ["norm", "rope", "cache", "selection", "vocabulary", "candidates", "by_head", "held"],
    ["softmax", "gathered"],
    ["indexer", "attention", "mlp", "experts"],
    ["exchange"],
    ["moe"],
    ["block"],
    ["segment", "mtp"],
    ["model"],
    ["tree_store", "published.header", "published.names", "published.storage"],
    ["published.tensor_file"],
    ["tree_writer", "published.safetensors", "published.torch_file", "quantization"],
    ["published.exports", "published.subset"],
    ["checkpoint", "published.files", "published.check", "published.slices"],
    ["published.source", "published.native"],
    ["load", "info", "inference", "doctor"],
    ["plan", "server"],
    ["commands"],
    ["__main__"],
]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def rank(module):
    """The line of `ORDER` that a module of glm5_jax stands in."""
    name = module.removeprefix("glm5_jax.")
    for number, line in enumerate(ORDER):
        if any(name == entry or name.startswith(entry + ".") for entry in line):
            return number
    raise AssertionError(f"{module} stands nowhere in ORDER")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_import_downwards_only(path):
    package = path.relative_to(ROOT).parts[0]
    forbidden = {"train": {"convert"}, "convert": {"train"}, "glm5_jax": {"train", "convert"}}
    tops = {module.partition(".")[0] for module in imported(path)}
    assert not tops & (forbidden[package] | {"tests", "benchmarks"})


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.is_relative_to(ROOT / "glm5_jax")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_the_model_is_built_from_the_bottom_up(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if module in ("glm5_jax", "glm5_jax.published"):
        return
    for other in imported(path):
        if other.startswith("glm5_jax."):
            assert rank(other) <= rank(module), f"{module} imports {other}"


def test_everything_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = ("serve", "train", "parquet", "eval", "tensorboard", "wandb", "torch", "http")
    own = [line for name in optional for line in extras[name]]
    declared = [*project["dependencies"], *own, *requires("flax")]
    names = {re.split(r"[^\w-]", line)[0].lower().replace("-", "_") for line in declared}
    names |= {"orbax" if name == "orbax_checkpoint" else name for name in names}
    for path in FILES:
        for module in imported(path):
            top = module.partition(".")[0]
            assert top in names | sys.stdlib_module_names | set(PACKAGES), f"{path}: {module}"


def test_nothing_is_unpickled():
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"\bpickle\.|allow_pickle=True", text), path
        for arguments in re.findall(r"torch\.load\((.*)", text):
            assert "weights_only=True" in arguments, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 300
