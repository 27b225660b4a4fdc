"""Files behind a network that fails as a test likes."""

from fsspec.implementations.memory import MemoryFileSystem

SMALL = {"README.md": "# A model", "LICENSE": "MIT", "tokenizer.json": "{}"}


class Unruly(MemoryFileSystem):
    """Files in memory, with whatever a test has happen to requests."""

    protocol = "unruly"
    store, pseudo_dirs = {}, [""]
    before = None  # is called with the path and the bounds of a part, or with the path alone
    after = None  # makes of the part what is sent

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("unruly://"))

    def info(self, path, **kwargs):
        if Unruly.before:
            Unruly.before(path)
        return super().info(path, **kwargs)

    def cat_file(self, path, start=None, end=None, **kwargs):
        if Unruly.before:
            Unruly.before(path, start, end)
        data = super().cat_file(path, start, end)
        return Unruly.after(path, start, end, data) if Unruly.after else data


def upload(source, only=""):
    for path in source.iterdir():
        if path.name.startswith(only):
            Unruly().pipe_file(f"/bucket/model/{path.name}", path.read_bytes())


def is_shard(path):
    return path.endswith(".safetensors")
