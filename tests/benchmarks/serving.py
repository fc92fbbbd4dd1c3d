"""Time to the first token, between tokens, and tokens per second of running servers.

  python -m flaxlm.serve --workdir=smollm2 --port=8001 --slots=16 --context=256 &
  transformers serve --port 8002 --device cpu --dtype float32 &
  python tests/benchmarks/serving.py ours=http://127.0.0.1:8001 \
    theirs=http://127.0.0.1:8002 --model theirs=/path/to/smollm2

Each turn asks every server, one after another, so that a slower hour is slower for all.
Clients are threads with a connection each; their prompts differ. Texts are greedy, and
a server is only asked while the others are idle.
"""

import argparse
import http.client
import itertools
import json
import statistics
import threading
import time
import urllib.parse

WORDS = "time year people way day man thing woman life child world school state family"


def ask(address: str, model: str, number: int, max_tokens: int, seen: list) -> None:
  """Streams one chat; appends (tokens, moments of the start and of each piece)."""
  url = urllib.parse.urlsplit(address)
  words = WORDS.split()
  topic = " ".join(words[(number + i * 3) % len(words)] for i in range(24))
  message = {"role": "user", "content": f"Write a long story of {number}: {topic}."}
  body = {"messages": [message], "stream": True, "max_tokens": max_tokens}
  body |= {"temperature": 0, "stream_options": {"include_usage": True}}
  body |= {"model": model} if model else {}
  connection = http.client.HTTPConnection(url.hostname, url.port, timeout=600)
  moments, usage = [time.perf_counter()], None
  connection.request(
    "POST",
    "/v1/chat/completions",
    json.dumps(body),
    {"content-type": "application/json"},
  )
  answer = connection.getresponse()
  assert answer.status == 200, answer.read()
  for line in answer:
    if line.startswith(b"data: {"):
      event = json.loads(line[6:])
      usage = event.get("usage") or usage
      if event["choices"] and event["choices"][0]["delta"].get("content"):
        moments.append(time.perf_counter())
  connection.close()
  tokens = usage["completion_tokens"] if usage else len(moments) - 1
  seen.append((tokens, moments))


def measure(
  address: str, model: str, clients: int, max_tokens: int, first: int
) -> dict:
  """Returns the figures of `clients` texts at once."""
  seen, began = [], time.perf_counter()
  threads = [
    threading.Thread(target=ask, args=(address, model, first + i, max_tokens, seen))
    for i in range(clients)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  wall = time.perf_counter() - began
  assert len(seen) == clients, "a request failed"
  gaps = [b - a for _, one in seen for a, b in itertools.pairwise(one[1:])]
  return {
    "first": statistics.median(one[1] - one[0] for _, one in seen),
    "gap": statistics.median(gaps),
    "gap99": sorted(gaps)[int(0.99 * len(gaps))],
    "rate": sum(tokens for tokens, _ in seen) / wall,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("servers", nargs="+", metavar="NAME=URL")
  parser.add_argument("--model", action="append", default=[], metavar="NAME=MODEL")
  parser.add_argument("--clients", default="1,4,16")
  parser.add_argument("--max_tokens", type=int, default=48)
  parser.add_argument("--turns", type=int, default=3)
  args = parser.parse_args()
  servers = dict(pair.split("=", 1) for pair in args.servers)
  models = dict(pair.split("=", 1) for pair in args.model)
  for name, address in servers.items():  # compile, load, fill caches
    measure(address, models.get(name, ""), 1, 8, 0)
  print("clients  server      first token   between p50   between p99   tokens/s")
  for clients in map(int, args.clients.split(",")):
    found: dict[str, list[dict]] = {name: [] for name in servers}
    for turn in range(args.turns):
      for name, address in servers.items():
        first = 1 + 100 * turn  # other prompts each turn: none is cached
        one = measure(address, models.get(name, ""), clients, args.max_tokens, first)
        found[name].append(one)
    for name, rows in found.items():
      middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
      print(
        f"{clients:7}  {name:10}  {1e3 * middle['first']:8.0f} ms  "
        f"{1e3 * middle['gap']:9.1f} ms  {1e3 * middle['gap99']:9.1f} ms  "
        f"{middle['rate']:9.1f}",
        flush=True,
      )


if __name__ == "__main__":
  main()
