"""The page in a real Chromium: slow, and skipped where that or Selenium is absent."""

import json
import shutil
import time

import pytest

from tests.serving.conftest import TEMPLATE

pytestmark = pytest.mark.slow
FLAGS = (
  "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
  "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  webdriver = pytest.importorskip("selenium.webdriver")
  program, driver = shutil.which("chromium"), shutil.which("chromedriver")
  if not (program and driver):
    pytest.skip("chromium and chromedriver are not installed")
  options = webdriver.ChromeOptions()
  options.binary_location = program
  home = tmp_path_factory.mktemp("chromium")
  for flag in (*FLAGS, f"--user-data-dir={home}"):
    options.add_argument(flag)
  options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
  found = webdriver.Chrome(options, webdriver.ChromeService(driver))
  yield found
  found.quit()


@pytest.fixture
def page(browser, served):
  """The page without any conversation; afterwards no error was logged, and nothing
  was fetched from elsewhere."""
  home = f"http://127.0.0.1:{served.port}"
  browser.get(home)
  browser.get_log("performance")  # Chromium's own first page
  browser.execute_script("localStorage.clear()")
  browser.get(home)
  wait(lambda: "context" in text(browser, "status"))
  yield browser
  assert [x for x in browser.get_log("browser") if x["level"] == "SEVERE"] == []
  for entry in browser.get_log("performance"):
    message = json.loads(entry["message"])["message"]
    if message["method"] == "Network.requestWillBeSent":
      url = message["params"]["request"]["url"]
      assert url.startswith((home, "data:", "blob:", "chrome:")), url


def wait(condition, seconds: float = 60):
  limit = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < limit
    time.sleep(0.02)


def text(page, name: str) -> str:
  return page.execute_script(f"return document.getElementById('{name}').textContent")


def put(page, name: str, value) -> None:
  code = (
    "const box = document.getElementById(arguments[0]); box.value = arguments[1];"
    "box.dispatchEvent(new Event('input')); box.dispatchEvent(new Event('change'))"
  )
  page.execute_script(code, name, value)


def press(page, name: str) -> None:
  page.execute_script(f"document.getElementById('{name}').click()")


def turns(page) -> list[str]:
  code = "return [...document.querySelectorAll('.turn > :first-child')]"
  return page.execute_script(code + ".map(x => x.textContent)")


def ask(page, message: str, **settings) -> None:
  for name, value in settings.items():
    put(page, name, value)
  put(page, "ask", message)
  press(page, "send")


def test_an_answer_streams_and_is_what_the_api_says(page, served):
  count = "window.changes = 0; new MutationObserver(() => window.changes++)"
  box = "document.getElementById('turns')"
  options = "{childList: true, subtree: true, characterData: true}"
  page.execute_script(f"{count}.observe({box}, {options})")
  ask(page, "Who is <b>there</b>?", temperature=0, max_tokens=40)
  wait(lambda: "per second" in text(page, "status"))
  messages = [{"role": "user", "content": "Who is <b>there</b>?"}]
  body = {"messages": messages, "temperature": 0, "max_tokens": 40, "top_p": 0.95}
  expected = served.post("/v1/chat/completions", body)[1]
  content = expected["choices"][0]["message"]["content"]
  assert turns(page) == ["Who is <b>there</b>?", content]
  assert page.execute_script("return window.changes") >= 3
  assert page.execute_script("return document.querySelector('#turns b')") is None
  first = turns(page)
  page.refresh()
  wait(lambda: len(turns(page)) == 2)
  assert turns(page) == first  # kept by the browser
  press(page, "again")
  wait(lambda: "per second" in text(page, "status"))
  assert turns(page) == first


def test_stop_frees_the_slot(page, served, monkeypatch):
  step = served.server.engine.step

  def slow_step():
    time.sleep(0.1)
    return step()

  monkeypatch.setattr(served.server.engine, "step", slow_step)
  ask(page, "Tell me all", temperature=1, max_tokens=80)
  wait(lambda: len(turns(page)) == 2 and turns(page)[1])
  assert served.server.engine.num_busy == 1
  press(page, "stop")
  served.wait_until_idle()
  wait(lambda: text(page, "status") == "stopped")


def test_what_a_model_writes_stays_text(page, served, monkeypatch):
  planted = "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'>日本🙂"
  choice = "flaxlm.serving.answers.Choice.take"
  from flaxlm.serving.answers import Choice

  take = Choice.take

  def plant(self):
    text, new = take(self)
    return (planted if text else ""), new

  monkeypatch.setattr(choice, plant)
  ask(page, "Hello", temperature=0, max_tokens=3)
  wait(lambda: "per second" in text(page, "status"))
  assert planted in turns(page)[1]
  assert page.execute_script("return window.hit") is None


def test_probabilities_and_plain_continuation(page):
  page.execute_script("document.getElementById('chances').checked = true")
  press(page, "asPlain")
  put(page, "max_tokens", 6)
  put(page, "text", "It was the")
  press(page, "send")
  wait(lambda: "per second" in text(page, "status"))
  titles = page.execute_script(
    "return [...document.querySelectorAll('#written .token')].map(x => x.title)"
  )
  assert len(titles) == 6 and all("%" in title for title in titles)


def test_an_error_is_shown_and_a_base_model_has_no_chat(page, served, monkeypatch):
  ask(page, "word " * 400)
  wait(lambda: "context" in text(page, "status") and "prompt" in text(page, "status"))
  assert page.execute_script("return document.getElementById('status').className")
  page.get_log("browser")  # the refused request
  monkeypatch.setattr(served.server.model, "template", None)
  page.refresh()
  wait(lambda: page.execute_script("return document.getElementById('asChat').disabled"))
  assert TEMPLATE
