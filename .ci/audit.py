"""Three scans for security, together under a minute: pip-audit, bandit, secrets.

  python .ci/audit.py

Exit codes: 0 nothing found, 1 something was. Where the service of vulnerabilities does
not answer, for want of a network, that scan says so and fails nothing.
"""

import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from flaxlm.errors import SECRET  # noqa: E402

# Findings that were looked at, and why they stay.
ACCEPTED = {
  "B101": "assertions are for our own mistakes; users' are errors",
  "B105": "no passwords: values of fields whose names contain `token`",
  "B311": "random numbers of training, not of cryptography",
  "B403": "pickles are listed by pickletools and never loaded; a test forbids pickle",
  "B404": "subprocess starts our own commands",
  "B603": "with lists of arguments, never through a shell",
  "B607": "tools are found on the user's own PATH",
  "B615": "files of the hub are parsed as data; nothing in them is run",
}
VULNERABILITIES: dict[str, str] = {}  # accepted ones: id: why
KEY = "-----BEGIN [A-Z ]*PRIVATE KEY-----"
SECONDS = 40  # for the service of vulnerabilities, which may be slow or absent


def main() -> int:
  found = [*vulnerabilities(), *weaknesses(), *secrets(tracked_text())]
  for line in found:
    print(line)
  print(f"audit: {len(found)} findings")
  return 1 if found else 0


def vulnerabilities() -> list[str]:
  """Returns what OSV knows about the packages of this environment."""
  command = [sys.executable, "-m", "pip_audit", "--service=osv", "--format=json"]
  command += ["--progress-spinner=off", "--timeout=5", "--skip-editable"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    packages = json.loads(done.stdout)["dependencies"]
  except (subprocess.TimeoutExpired, ValueError, KeyError):
    print("audit: the service of vulnerabilities did not answer; not scanned")
    return []
  return [
    f"pip-audit: {package['name']} {package['version']}: {found['id']}, "
    f"mended in {' '.join(found['fix_versions']) or 'no version'}"
    for package in packages
    for found in package.get("vulns", ())
    if found["id"] not in VULNERABILITIES
  ]


def weaknesses() -> list[str]:
  """Returns what bandit finds in the code, apart from what is accepted."""
  command = [sys.executable, "-m", "bandit", "--quiet", "--format=json"]
  command += [f"--skip={','.join(ACCEPTED)}", "--recursive", "flaxlm", "configs"]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  report = json.loads(done.stdout)
  found = [*report["results"], *({"test_id": "", **e} for e in report["errors"])]
  return [
    f"bandit: {x['filename']}:{x.get('line_number')}: {x['test_id']} "
    f"{x.get('issue_text') or x.get('reason')}"
    for x in found
  ]


def tracked_text():
  """Yields (place, text) of each tracked file, and of each line ever committed."""
  git = ["git", "-C", str(ROOT)]
  names = subprocess.run([*git, "ls-files", "-z"], capture_output=True, check=True)
  for name in filter(None, names.stdout.decode().split("\0")):
    if (ROOT / name).is_file():
      yield name, (ROOT / name).read_text(errors="replace")
  history = [*git, "log", "--all", "-p", "-U0", "--no-color", "--format=%h", "-G"]
  history.append(f"{KEY}|AKIA[0-9A-Z]{{16}}|hf_|gh[pousr]_|sk-|xox[abp]-|://[^/ @]*:")
  done = subprocess.run([*history, "-E"], capture_output=True, check=True)
  yield "the history", done.stdout.decode(errors="replace")


def secrets(texts) -> list[str]:
  """Returns where texts hold a password, a token or a private key, without it.

  Args:
    texts: (place, text) of each.
  """
  pattern = re.compile(f"{SECRET.pattern}|{KEY}")
  return [
    f"secret: {place}, line {text.count(chr(10), 0, match.start()) + 1}"
    for place, text in texts
    for match in pattern.finditer(text)
  ]


if __name__ == "__main__":
  sys.exit(main())
