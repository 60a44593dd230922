// Load the page again every two seconds, and replace the parts with data-live. The server sorts and
// filters; without this script, its buttons and its form load the whole page.
"use strict";

(() => {
  const INTERVAL = 2000; // ms between the end of a load and the next one
  const PATIENCE = 15000; // ms until a load counts as failed
  const TYPING = 250; // ms after a key until the filter is applied
  const pause = document.getElementById("pause");
  const note = document.getElementById("note");
  const choice = document.getElementById("choice");
  let paused = false;
  let timer = 0;
  let typing = 0; // the timer of the filter
  let loading = null; // the AbortController of the present load

  const address = () => {
    const query = new URLSearchParams(new FormData(choice));
    for (const [name, value] of [...query]) if (!value) query.delete(name);
    return query.toString() ? `/?${query}` : "/";
  };

  const replace = (next) => {
    const focused = document.activeElement.id;
    for (const old of document.querySelectorAll("[data-live]")) {
      const part = next.getElementById(old.id);
      if (!part) continue;
      const link = [...old.querySelectorAll("a")].indexOf(document.activeElement);
      const scrolled = [...old.querySelectorAll(".scroll")].map((box) => box.scrollLeft);
      old.replaceChildren(...part.childNodes);
      old.querySelectorAll(".scroll").forEach((box, i) => (box.scrollLeft = scrolled[i] || 0));
      if (link >= 0) old.querySelectorAll("a")[link]?.focus({ preventScroll: true });
    }
    if (focused && document.activeElement.id !== focused) {
      document.getElementById(focused)?.focus({ preventScroll: true });
    }
  };

  const load = async () => {
    clearTimeout(timer);
    loading?.abort();
    const own = (loading = new AbortController());
    const limit = setTimeout(() => own.abort(), PATIENCE);
    try {
      const answer = await fetch(address(), { signal: own.signal });
      const text = await answer.text();
      if (!answer.ok) throw new Error(text);
      if (loading !== own) return; // a newer load has begun
      replace(new DOMParser().parseFromString(text, "text/html"));
      note.textContent = "";
    } catch (error) {
      if (loading === own && !note.textContent) {
        note.textContent = "No answer. The page shows the last state, and tries again.";
      }
    } finally {
      clearTimeout(limit);
      if (loading === own) later();
    }
  };

  const later = () => {
    clearTimeout(timer);
    if (!paused && !document.hidden) timer = setTimeout(load, INTERVAL);
  };

  const choose = () => {
    history.replaceState(null, "", address());
    load();
  };

  pause.hidden = false;
  pause.addEventListener("click", () => {
    paused = !paused;
    pause.textContent = paused ? "Continue" : "Pause";
    if (paused) clearTimeout(timer);
    else load();
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[name=sort]");
    if (!button) return;
    event.preventDefault();
    document.getElementById("sort").value = button.value;
    choose();
  });
  choice.addEventListener("submit", (event) => {
    event.preventDefault();
    choose();
  });
  choice.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(choose, TYPING);
  });
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) clearTimeout(timer);
    else if (!paused) load();
  });
  later();
})();
