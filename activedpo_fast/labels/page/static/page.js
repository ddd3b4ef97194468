"use strict";
// The token is the part of the address after #, which browsers send to nobody.
const token = location.hash.slice(1);
const byId = (id) => document.getElementById(id);

let shown = null; // the pair in sight
let busy = false; // a request is under way: keys do nothing
let comparing = false;
let markdown = localStorage.getItem("markdown") !== "off";
let keysOn = localStorage.getItem("keys") !== "off";

// -- seconds in sight ---------------------------------------------------------------------------

const clock = {
  total: 0,
  since: 0,
  restart() { this.total = 0; this.since = performance.now(); },
  seconds() { return (this.total + (document.hidden ? 0 : performance.now() - this.since)) / 1000; },
  visibilityChanged() {
    if (document.hidden) this.total += performance.now() - this.since;
    else this.since = performance.now();
  },
};
document.addEventListener("visibilitychange", () => clock.visibilityChanged());

// -- requests -----------------------------------------------------------------------------------

async function ask(path, body) {
  const options = { headers: { Authorization: `Bearer ${token}` } };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The command has ended. All answers so far are saved; run it again to go on.");
  }
  const found = await response.json();
  // 409: the page is behind, and the response says what to show now.
  if (!response.ok && response.status !== 409) throw new Error(found.error);
  return found;
}

async function whileBusy(work) {
  if (busy) return;
  busy = true;
  document.body.setAttribute("aria-busy", "true");
  try {
    byId("error").textContent = "";
    await work();
  } catch (error) {
    byId("error").textContent = error.message;
  } finally {
    busy = false;
    document.body.removeAttribute("aria-busy");
  }
}

const load = () => whileBusy(async () => show(await ask("/api/pair")));

const answer = (choice) => whileBusy(async () => {
  if (shown === null) return;
  const strength = document.querySelector("[name=strength]:checked");
  show(await ask("/api/answer", {
    pair: shown.number,
    choice,
    seconds: clock.seconds(),
    strength: strength === null ? null : Number(strength.value),
    comment: byId("comment").value,
  }));
});

const undo = () => whileBusy(async () => show(await ask("/api/undo", {})));

const finish = () => whileBusy(async () => {
  await ask("/api/finish", {});
  byId("finish").hidden = byId("done-note").hidden = true;
  byId("undo").disabled = true;
  say("Finished. You can close this page.");
  byId("done-title").textContent = "Finished. You can close this page.";
});

// -- what is shown ------------------------------------------------------------------------------

function show(state) {
  shown = state.pair;
  comparing = false;
  showProgress(state);
  byId("pair").hidden = shown === null;
  byId("done").hidden = shown !== null;
  byId("undo").disabled = state.done === 0;
  byId("question").textContent = state.question;
  const undone = state.undone ?? { strength: null, comment: "" };
  byId("comment").value = undone.comment;
  for (const radio of document.getElementsByName("strength")) {
    radio.checked = Number(radio.value) === undone.strength;
  }
  if (shown === null) byId("report").textContent = state.report;
  else showTexts();
  window.scrollTo(0, 0);
  byId(shown === null ? "done-title" : "prompt-title").focus({ preventScroll: true });
  byId("error").textContent = state.error ?? "";
  say(shown === null ? "All pairs are labeled." : `Pair ${state.done + 1} of ${state.done + state.left}.`);
  clock.restart();
}

function showProgress({ done, left, seconds, labeler }) {
  document.title = `${done} of ${done + left} - Label pairs (${labeler})`;
  byId("bar").max = Math.max(done + left, 1);
  byId("bar").value = done;
  byId("count").textContent = `${done} of ${done + left} done`;
  const known = seconds !== null && seconds > 0;
  byId("pace").textContent = known && left > 0
    ? `${(60 / seconds).toFixed(1)} per minute, ${duration(left * seconds)} left` : "";
}

function duration(seconds) {
  const minutes = Math.ceil(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function showTexts() {
  for (const part of ["prompt", "left", "right"]) {
    byId(part).replaceChildren(...shown[part].map(messageElement));
  }
  byId("markdown").setAttribute("aria-pressed", String(markdown && !comparing));
  byId("compare").setAttribute("aria-pressed", String(comparing));
}

function messageElement({ role, text, html, images = [] }) {
  const body = document.createElement("div");
  body.className = markdown ? "rendered" : "plain";
  body.dir = "auto"; // right to left where the text is
  // The server has made the HTML from Markdown; tags in the text are text there.
  if (markdown) body.innerHTML = html;
  else body.textContent = text;
  if (role === null) return body;
  const bubble = document.createElement("div");
  const name = document.createElement("span");
  bubble.className = "message";
  bubble.dataset.role = role;
  name.className = "role";
  name.textContent = role;
  bubble.append(name, ...images.map(imageElement), body);
  return bubble;
}

function imageElement(address) {
  const image = document.createElement("img");
  image.src = address; // data that the server has made of an image
  image.alt = "image of the prompt";
  return image;
}

const toggleDifferences = () => whileBusy(async () => {
  if (shown === null) return;
  comparing = !comparing;
  showTexts();
  if (!comparing) return;
  const found = await ask(`/api/differences/${shown.number}`);
  for (const side of ["left", "right"]) {
    const body = document.createElement("div");
    body.className = "plain";
    body.dir = "auto";
    for (const [text, differs] of found[side]) {
      const piece = document.createElement(differs ? "mark" : "span");
      piece.textContent = text;
      body.append(piece);
    }
    byId(side).replaceChildren(body);
  }
  say("Words that differ are marked.");
});

function toggleMarkdown() {
  if (shown === null || busy) return;
  if (!comparing) markdown = !markdown;
  comparing = false;
  localStorage.setItem("markdown", markdown ? "on" : "off");
  showTexts();
  say(markdown ? "Markdown is rendered." : "Texts are shown as they are.");
}

function setKeys(on) {
  keysOn = on;
  localStorage.setItem("keys", on ? "on" : "off");
  byId("keys").checked = on;
  document.body.classList.toggle("no-keys", !on);
}

function say(text) {
  byId("status").textContent = text;
}

// -- keys and buttons ---------------------------------------------------------------------------

function chooseStrength(value) {
  const radio = document.querySelector(`[name=strength][value="${value}"]`);
  radio.checked = !radio.checked;
  if (radio.checked) say(radio.parentElement.textContent.trim());
}

const keys = {
  "1": () => answer("left"),
  "2": () => answer("right"),
  "0": () => answer("tie"),
  t: () => answer("tie"),
  s: () => answer("skip"),
  u: undo,
  m: toggleMarkdown,
  d: toggleDifferences,
  q: () => chooseStrength(1),
  w: () => chooseStrength(2),
  e: () => chooseStrength(3),
  c: () => byId("comment").focus(),
};

document.addEventListener("keydown", (event) => {
  if (event.target === byId("comment")) {
    if (event.key === "Escape") byId("prompt-title").focus({ preventScroll: true });
    return; // its own Ctrl-Z too
  }
  if (event.repeat || !keysOn) return;
  const undoing = event.key === "z" && (event.ctrlKey || event.metaKey) && !event.shiftKey;
  if (!undoing && (event.ctrlKey || event.metaKey || event.altKey)) return;
  const act = undoing ? undo : Object.hasOwn(keys, event.key) ? keys[event.key] : null;
  if (act === null) return;
  event.preventDefault();
  act();
});

for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => answer(button.dataset.choice));
}
byId("form").addEventListener("submit", (event) => event.preventDefault());
byId("undo").addEventListener("click", undo);
byId("markdown").addEventListener("click", toggleMarkdown);
byId("compare").addEventListener("click", toggleDifferences);
byId("finish").addEventListener("click", finish);
byId("keys").addEventListener("change", (event) => setKeys(event.target.checked));

setKeys(keysOn);
load();
