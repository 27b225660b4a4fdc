"""What conversions that delete are told, and what they leave."""

from tests.tiny import TINY

DELETE = "--delete-source-shards"

# Shards of which a stand-in keeps a part only.
RAW = TINY | {"vocab_size": 193, "moe_intermediate_size": 96}


def shards(source):
    return sorted(source.glob("*.safetensors"))
