"""The page in a browser: titles typed with completion, by keyboard alone; nothing from elsewhere; hostile titles are text."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from browser import BROWSER, Browser

from recbole_llm.serving.app import make_app

EVIL = "<img src=x onerror='window.evil=1'><script>window.evil=1</script> & “quoted” \u202egnp"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")]


@contextmanager
def serving(service):
    """The address of a server in a thread."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(make_app(service), log_config=None))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.02)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def page(service, tmp_path):
    browser = Browser(tmp_path)
    with serving(service) as address:
        browser.address = address
        yield browser
        browser.close()


def results(page):
    return page.run("[...document.querySelectorAll('#items .title')].map(title => title.textContent)")


def test_by_keyboard_alone(page, service):
    page.open(page.address)
    page.wait("document.title === 'LLMSRec on chain'")
    first, second = service.titles.texts[3], service.titles.texts[8]
    for _ in range(10):  # as far as the first field
        page.press("Tab")
        if page.run("document.activeElement.id") == "title":
            break
    page.type(first[:9].lower())
    page.wait("document.querySelectorAll('#options li').length")
    shown = page.run("[...document.querySelectorAll('#options li')].map(option => option.textContent)")
    assert first in shown and page.run("document.getElementById('title').getAttribute('aria-expanded')") == "true"
    for _ in range(shown.index(first) + 1):
        page.press("ArrowDown")
    chosen = "document.getElementById(document.activeElement.getAttribute('aria-activedescendant')).textContent"
    assert page.run(chosen) == first
    page.press("Enter")
    page.wait("document.querySelectorAll('#history li').length === 1")
    page.type(second)
    page.press("Enter")  # what was typed, without a choice
    page.wait("document.querySelectorAll('#history li').length === 2")
    page.press("Enter")
    page.wait("document.querySelectorAll('#items li').length === 10")
    (expected,) = service.trained.recommend(histories=[[first, second]])
    assert results(page) == [best.title for best in expected]
    reasons = page.run("[...document.querySelectorAll('#items .because')].map(reason => reason.textContent)")
    assert len(reasons) == 10 and all(first in reason or second in reason for reason in reasons)
    page.run("document.querySelector('#history button').focus()")
    page.press(" ")
    page.wait("document.querySelectorAll('#history li').length === 1")
    assert page.run("document.activeElement.getAttribute('aria-label')") == f"Remove {second}"
    assert all(address.startswith((page.address, "data:")) for address in page.requests) and len(page.requests) > 6
    assert page.complaints == []


def test_a_user_and_mistakes(page, service):
    page.open(page.address)
    page.wait("!document.getElementById('by-user').hidden")
    page.run("document.getElementById('ask').click()")
    page.wait("document.getElementById('status').textContent === 'Add a title first.'")
    page.run("document.getElementById('user').focus()")
    page.type("u1")
    page.press("Enter")
    page.wait("document.querySelectorAll('#items li').length === 10")
    history = page.run("[...document.querySelectorAll('#history span')].map(title => title.textContent)")
    assert history == service.trained.history_of("u1")
    assert results(page) == [best.title for best in service.trained.recommend(users="u1")[0]]
    page.run("document.getElementById('clear').click()")
    page.type("Unwritten")
    page.press("Enter")
    page.wait("document.getElementById('status').textContent.includes('no title like')")
    assert page.run("document.getElementById('status').classList.contains('bad')")


def test_hostile_titles_are_text(page, service, monkeypatch):
    from recbole_llm.serving.titles import Titles

    texts = [service.titles.texts[0], *(f"{EVIL} {number}" for number in range(1, len(service.titles.texts)))]
    monkeypatch.setattr(service, "titles", Titles(service.titles.ids, texts))
    page.open(page.address)
    page.run("document.getElementById('title').focus()")
    page.type("<img src=x")
    page.wait("document.querySelectorAll('#options li').length === 8")
    page.press("ArrowDown")
    page.press("Enter")
    page.press("Enter")
    page.wait("document.querySelectorAll('#items li').length === 10")
    assert all(title.startswith(EVIL) for title in results(page))
    assert page.run("window.evil === undefined && document.images.length === 0 && document.scripts.length === 1")
    assert page.complaints == []


def test_light_and_dark_wide_and_narrow(page, tmp_path):
    """Nothing is wider than the window; text stands out from its ground. SERVING_PICTURES names a folder for pictures."""
    folder = Path(os.environ.get("SERVING_PICTURES", tmp_path))
    page.open(page.address)
    page.run("document.getElementById('title').focus()")
    page.type("The Iron Ferry")
    page.press("Enter")
    page.wait("document.querySelectorAll('#history li').length === 1")
    page.press("Enter")
    page.wait("document.querySelectorAll('#items li').length === 10")
    page.type("the")
    page.wait("document.querySelectorAll('#options li').length === 8")
    page.press("ArrowDown")
    grounds = set()
    for width in (1280, 400):
        for dark in (False, True):
            page.look(width, dark)
            assert page.run("document.documentElement.scrollWidth <= innerWidth")
            colors = json.loads(page.run(CONTRAST))
            assert min(colors["contrasts"]) >= 4.5, colors
            grounds.add(colors["ground"])
            page.picture(folder / f"{width}-{'dark' if dark else 'light'}.png")
    assert len(grounds) == 2


# The contrast of each text with the ground behind it, as WCAG has it.
CONTRAST = """(() => {
  const parts = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const linear = (value) => value <= .03928 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
    const [r, g, b] = parts(color).map((value) => linear(value / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor, [, , , alpha = 1] = parts(color);
      if (alpha > 0) return color;
    }
  };
  const contrasts = [...document.body.querySelectorAll("*")]
    .filter((node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()) && node.offsetParent)
    .filter((node) => node.tagName !== "SCRIPT")
    .map((node) => [light(getComputedStyle(node).color), light(ground(node))])
    .map(([one, other]) => (Math.max(one, other) + .05) / (Math.min(one, other) + .05));
  return JSON.stringify({ contrasts, ground: ground(document.body) });
})()"""
