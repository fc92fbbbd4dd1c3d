"""Serve a trained model over HTTP, to clients of OpenAI's API and to a web page.

  python -m flaxlm.serve --workdir=runs/quickstart --port=8000
  curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "def main("}'

It is reached from this machine alone, unless --host names another address; then it
needs a key: --api_key_file, or FLAXLM_API_KEY. All programs are compiled before /health
says that it is well. SIGTERM ends it after the requests that it has.
"""

import contextlib
import os
import pathlib
import signal

from flaxlm import cli, machine
from flaxlm.errors import ConfigError, MissingInputError, UserError
from flaxlm.open_model import find_model, load_model

_LOCAL = ("127.0.0.1", "localhost", "::1")


def main(argv: list[str] | None = None) -> None:
  parser = cli.make_parser(__doc__, "serve")
  parser.add_argument("--workdir", required=True, help="directory of the run")
  parser.add_argument("--step", type=int, help="checkpoint to use; default: the newest")
  parser.add_argument("--host", default="127.0.0.1", help="address (127.0.0.1)")
  parser.add_argument("--port", type=int, default=8000, help="0 chooses one (8000)")
  parser.add_argument(
    "--slots", type=int, default=0, help="texts at once; default: 4 on a CPU, else 16"
  )
  parser.add_argument(
    "--context", type=int, default=0, help="tokens per text; default: the model's"
  )
  parser.add_argument(
    "--max_queue", type=int, default=64, help="requests that may wait (64)"
  )
  parser.add_argument(
    "--name", default="", help="of the model; default: the directory's"
  )
  parser.add_argument(
    "--any_model", action="store_true", help="answer whatever model a client names"
  )
  parser.add_argument("--api_key_file", default="", help="a file with the key")
  parser.add_argument(
    "--allow_host", action="append", default=[], metavar="NAME",
    help="a name that clients reach this server by; may be repeated",
  )  # fmt: skip
  parser.add_argument(
    "--allow_origin", action="append", default=[], metavar="URL",
    help="a web page that may call this server, as https://example.org",
  )  # fmt: skip
  parser.add_argument(
    "--chat_template", default="", help="a Jinja2 file, for a model without one"
  )
  parser.add_argument(
    "--strict", action="store_true", help="refuse fields that nobody knows"
  )
  args, overrides = cli.parse_arguments(parser, argv)
  key = _read_key(args.api_key_file)
  if args.host not in _LOCAL and not key:
    needed = "a key: --api_key_file=FILE, or FLAXLM_API_KEY"
    raise ConfigError("--host", args.host, needed, "--host=127.0.0.1")
  find_model(args.workdir, args.step, overrides)
  uvicorn = _import_uvicorn()
  machine.keep_freed_memory()
  model = load_model(args.workdir, args.step, overrides=overrides)
  server = _make_server(model, args, key)
  _serve(uvicorn, server, args)


def _read_key(path: str) -> str:
  """Returns the key that clients must send; "" if there is none."""
  if not path:
    return os.environ.get("FLAXLM_API_KEY", "")
  file = pathlib.Path(path)
  if not file.is_file():
    raise MissingInputError("--api_key_file", f"{file} (missing)", "a file with a key")
  if not (key := file.read_text().strip()):
    raise ConfigError("--api_key_file", f"{file}: empty", "a file with a key")
  return key


def _import_uvicorn():
  try:
    import starlette  # noqa: F401
    import uvicorn
  except ImportError as error:
    raise UserError(
      "serving needs more packages", str(error), "pip install 'flaxlm[serve]'"
    ) from error
  return uvicorn


def _make_server(model, args, key: str):
  """Returns the `Server`, after all programs have been compiled."""
  from flaxlm.inference.engine import Engine
  from flaxlm.inference.text import text_ids
  from flaxlm.serving.app import Server
  from flaxlm.tokenizer.chat_template import open_template

  if args.chat_template:
    model.template = open_template(args.chat_template, model.tokenizer)
  engine, config = None, model.config
  if config.causal and config.head == "lm":
    allowed_V = text_ids(model.tokenizer, config.vocab_size, model.end_ids)
    # One program makes a token for all slots, used or not. On a CPU those cost time.
    slots = args.slots or (4 if model.mesh.devices.flat[0].platform == "cpu" else 16)
    engine = Engine(
      model.model, model.mesh, model.rules, allowed_V, slots, args.context
    )
    mib, slots = engine.cache_bytes / 2**20, engine.num_slots
    print(
      f"{slots} slots of {engine.context} tokens take {mib:,.0f} MiB; compiling ...",
      flush=True,
    )
    engine.warm_up()
  hosts = () if args.host not in _LOCAL and not args.allow_host else (*_LOCAL, "[::1]")
  return Server(
    model,
    args.name or pathlib.Path(args.workdir).resolve().name,
    engine,
    key=key,
    hosts=hosts and (*hosts, args.host, *args.allow_host),
    origins=tuple(args.allow_origin),
    strict=args.strict,
    any_model=args.any_model,
    max_waiting=args.max_queue,
  )


def _serve(uvicorn, server, args) -> None:
  """Runs the server until a signal ends it, and the requests that it has."""
  from flaxlm.serving.app import make_app

  config = uvicorn.Config(
    make_app(server), host=args.host, port=args.port, log_level="warning",
    access_log=False, limit_concurrency=1000, timeout_keep_alive=30,
    h11_max_incomplete_event_size=64 << 10,
  )  # fmt: skip

  class Running(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self):  # uvicorn's own raises them again: no exit code of 0
      for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, self.handle_exit)
      yield

    async def startup(self, sockets=None):
      await super().startup(sockets)
      if self.started:
        port = self.servers[0].sockets[0].getsockname()[1]
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"serving {server.name} at http://{host}:{port}", flush=True)

  Running(config).run()


if __name__ == "__main__":
  cli.run_command(main)
