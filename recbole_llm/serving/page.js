"use strict";
// Everything from the server is put into the page as text (textContent), never as HTML.

const at = (id) => document.getElementById(id);
const title = at("title"), options = at("options"), historyList = at("history"), status = at("status"), results = at("items");
const WAIT = 120; // milliseconds without a key, after which titles are looked up
let history = []; // {item, title}
let shown = [], active = -1, lookup = 0, timer = 0, asking = 0;

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

async function read(path, init) {
  let answer;
  try {
    answer = await fetch(path, init);
  } catch {
    throw new Error("The server cannot be reached.");
  }
  const found = await answer.json().catch(() => ({ error: `The server answered ${answer.status}.` }));
  if (!answer.ok) throw new Error(found.error || `The server answered ${answer.status}.`);
  return found;
}

function say(text, bad = false) {
  status.textContent = text;
  status.classList.toggle("bad", bad);
}

// Titles that are being typed

function close() {
  options.hidden = true;
  options.replaceChildren();
  shown = [];
  active = -1;
  title.setAttribute("aria-expanded", "false");
  title.removeAttribute("aria-activedescendant");
}

function choose(place) {
  active = place;
  [...options.children].forEach((option, number) => option.setAttribute("aria-selected", String(number === place)));
  if (place < 0) {
    title.removeAttribute("aria-activedescendant");
    return;
  }
  title.setAttribute("aria-activedescendant", options.children[place].id);
  options.children[place].scrollIntoView({ block: "nearest" });
}

async function complete() {
  const query = title.value.trim(), mine = ++lookup;
  if (!query) return close();
  let found;
  try {
    found = await read(`items?limit=8&query=${encodeURIComponent(query)}`);
  } catch (error) {
    return say(error.message, true);
  }
  if (mine !== lookup) return; // more was typed
  close();
  if (!found.length) return;
  shown = found;
  options.replaceChildren(...found.map((item, place) => {
    const option = element("li", "", item.title);
    option.id = `option-${place}`;
    option.setAttribute("role", "option");
    option.setAttribute("aria-selected", "false");
    option.addEventListener("mousedown", (event) => { event.preventDefault(); add(item); });
    return option;
  }));
  options.hidden = false;
  title.setAttribute("aria-expanded", "true");
}

async function addTyped() {
  const query = title.value.trim();
  clearTimeout(timer);
  lookup++;
  try {
    const found = await read(`items?limit=1&query=${encodeURIComponent(query)}`);
    if (title.value.trim() !== query) return; // more was typed
    if (found.length) add(found[0]);
    else say(`There is no title like “${query}”.`, true);
  } catch (error) {
    say(error.message, true);
  }
}

title.addEventListener("input", () => {
  lookup++;
  clearTimeout(timer);
  timer = setTimeout(complete, WAIT);
});
title.addEventListener("blur", () => { lookup++; clearTimeout(timer); close(); });
title.addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    if (!shown.length) {
      complete();
    } else {
      const step = event.key === "ArrowDown" ? 1 : -1;
      choose((active + step + shown.length + (active < 0 && step < 0 ? 1 : 0)) % shown.length);
    }
    event.preventDefault();
  } else if (event.key === "Enter" && title.value.trim()) {
    event.preventDefault();
    if (active >= 0) add(shown[active]);
    else addTyped();
  } else if (event.key === "Escape") {
    lookup++;
    clearTimeout(timer);
    close();
  }
});

// The history

function add(item) {
  history.push(item);
  title.value = "";
  lookup++;
  clearTimeout(timer);
  close();
  draw();
  say("");
}

function draw() {
  historyList.replaceChildren(...history.map((item, place) => {
    const line = element("li"), remove = element("button", "", "×");
    line.append(element("span", "", item.title), remove);
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove ${item.title}`);
    remove.addEventListener("click", () => {
      history.splice(place, 1);
      draw();
      (historyList.children[Math.min(place, history.length - 1)]?.querySelector("button") || title).focus();
    });
    return line;
  }));
}

at("clear").addEventListener("click", () => {
  history = [];
  at("user").value = "";
  draw();
  results.replaceChildren();
  say("Add titles, then ask.");
  title.focus();
});

// Questions

at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const user = at("user").value.trim(), mine = ++asking;
  if (!history.length && !user) {
    say("Add a title first.", true);
    return title.focus();
  }
  const asked = { topk: Number(at("topk").value), exclude_history: at("exclude").checked };
  // Titles, which the server reads before ids: the id of one item may be the title of another.
  if (history.length) asked.history = history.map((item) => item.title);
  else asked.user = user;
  at("ask").disabled = true;
  say("Asking …");
  const began = performance.now();
  try {
    const found = await read("recommend", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(asked),
    });
    if (mine !== asking) return;
    if (user && !history.length) {
      history = found.history;
      at("user").value = "";
      draw();
    }
    show(found);
    const count = found.items.length, time = Math.round(performance.now() - began);
    say(`${count} item${count === 1 ? "" : "s"} in ${time} ms.`);
  } catch (error) {
    results.replaceChildren();
    say(error.message, true);
  } finally {
    at("ask").disabled = false;
  }
});

function show(found) {
  results.replaceChildren(...found.items.map((item) => {
    const line = element("li");
    line.append(element("span", "title", item.title), element("span", "score", item.score.toFixed(3)));
    if (item.because.length) {
      const near = item.because.map((reason) => `${reason.title} (${reason.similarity.toFixed(2)})`).join(", ");
      line.append(element("p", "because", `near ${near}`));
    }
    return line;
  }));
}

read("health").then((health) => {
  at("name").textContent = `${health.model} on ${health.dataset}`;
  document.title = at("name").textContent;
  at("about").textContent = `${health.items.toLocaleString("en")} items, search: ${health.search}, recbole-llm ${health.version}`;
  at("by-user").hidden = !health.users;
}, (error) => say(error.message, true));
