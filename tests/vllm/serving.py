"""A server for the tests, as `overture serve --engine vllm` starts it: model, options in JSON, arguments for vLLM."""

import json
import sys

from overture.serve.vllm.options import Options
from overture.serve.vllm.server import run

if __name__ == "__main__":
    model, options, *more = sys.argv[1:]
    run(model, Options(**json.loads(options)), more)
