"""A run that nothing interrupts."""

import json

import pytest

from tests.interruptions.runs import RAW, STAGES, command
from tests.once import programs_made_once
from tests.text import prepare_data
from train.__main__ import main


@pytest.fixture(autouse=True, scope="module")
def programs():
    with programs_made_once():
        yield


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    prepare_data(folder)
    (folder / "config.json").write_text(json.dumps(RAW))
    (folder / "stages.toml").write_text(STAGES)
    return folder


@pytest.fixture(scope="session")
def whole(workplace):
    """The run without an interruption."""
    run = workplace / "whole"
    assert main(command(workplace, run)) == 0
    return run
