"""What conversions that delete are told, and what they leave."""

from tests.resuming.runs import contents
from tests.tiny import TINY

DELETE = "--delete-source-shards"

# Shards of which a stand-in keeps a part only.
RAW = TINY | {"vocab_size": 193, "moe_intermediate_size": 96}


def shards(source):
    return sorted(source.glob("*.safetensors"))


def params(directory):
    """All but the record, which names the folder that was read."""
    said = ("conversion.json", "CONVERSION.md")
    return {name: data for name, data in contents(directory).items() if name not in said}
