"""For the tests of the plug-in for `llm`."""

from functools import cache
from typing import Any

import pytest

from ttt_e2e import llm_plugin


@cache
def _commands() -> Any:
    """The commands of `llm`, with those of our plug-in and of no other."""
    import llm.plugins

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.plugins, "LLM_LOAD_PLUGINS", "")
        llm.plugins.load_plugins()
    llm.plugins.pm.register(llm_plugin)
    from llm.cli import cli

    return cli


def run_llm(*words: str, input: str = "") -> Any:
    """The result of a command of `llm`, with its exit_code and output."""
    from click.testing import CliRunner

    return CliRunner().invoke(_commands(), words, input=input)
