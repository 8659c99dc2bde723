"use strict";
const at = id => document.getElementById(id);
const POINTS = 300; // at most, in the curve
const ANSWERS = 20; // that are kept when the page is loaded again, for each session
const SAME_WORDS = 3; // so many in a row, of an answer, are taken to be from a passage
// sessions: what the service has. current: the session that is asked. into: the one that reads the next text; "" makes
// a new one.
let sessions = [], current = location.hash.slice(1), into = current, reading = null, writing = null;
let asked = 0; // counts what makes a list of sessions out of date: another request for it, another session in use
let shown = ""; // the list that is on the page

function showError(error) {
  at("error").textContent = error && error.name !== "AbortError" ? error.message || String(error) : "";
}

async function request(path, options = {}) {
  const headers = {...options.headers};
  if (at("key").value) headers.Authorization = "Bearer " + at("key").value.trim();
  let response;
  try {
    response = await fetch(path, {...options, headers});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The service does not respond; is it running?");
  }
  if (response.ok) return response;
  let message = "The service responded with status " + response.status + ".";
  try { message = (await response.json()).error.message; } catch { /* the body is not JSON */ }
  throw new Error(message);
}

const post = (path, body, more = {}) => request(path, {
  method: "POST", body: JSON.stringify(body), headers: {"Content-Type": "application/json"}, ...more,
});

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) throw new Error("The connection was lost.");
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      if (part.startsWith(":")) continue; // a comment, to keep the connection alive
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

const count = number => Math.round(number).toLocaleString("en");
const size = bytes => bytes < 1 << 20 ? count(bytes / 1024) + " KiB" : (bytes / (1 << 20)).toFixed(1) + " MiB";

function element(tag, text = "", name = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

// -- reading

function draw(points) {
  const losses = points.map(p => p.loss), last = points.length ? points[points.length - 1].tokens : 1;
  const high = Math.max(...losses), low = Math.min(...losses), range = high - low || 1;
  const line = value => points.map(p =>
    (1000 * p.tokens / last).toFixed(1) + "," + (5 + 190 * (high - value(p)) / range).toFixed(1)).join(" ");
  at("curve").setAttribute("points", line(p => p.loss));
  at("mean").setAttribute("points", line(p => p.mean));
  at("losses").hidden = !points.length;
  if (!points.length) return;
  at("scale").textContent = "Loss from " + high.toFixed(2) + " (top) to " + low.toFixed(2) +
    " nats per token; the thick line is the mean so far.";
  at("end").textContent = count(last) + " tokens";
}

const joined = (a, b) => ({
  tokens: b.tokens, weight: a.weight + b.weight, mean: b.mean,
  loss: (a.loss * a.weight + b.loss * b.weight) / (a.weight + b.weight),
});

// The curve with another point: all of them stand for about as many tokens, however long the text becomes.
function extended(points, point) {
  const last = points[points.length - 1];
  if (last && last.weight + point.weight <= 2 * point.tokens / POINTS)
    return [...points.slice(0, -1), joined(last, point)];
  if (points.length < POINTS) return [...points, point];
  const halved = [];
  for (let i = 0; i + 1 < points.length; i += 2) halved.push(joined(points[i], points[i + 1]));
  return [...halved, point];
}

async function tokens(session) {
  return (await (await request("/v1/sessions/" + session)).json()).tokens;
}

function duration(seconds) {
  return seconds < 90 ? Math.ceil(seconds) + " s" : Math.ceil(seconds / 60) + " min";
}

async function read(file) {
  if (!file || reading) return;
  showError(null);
  reading = new AbortController();
  at("stop-reading").hidden = false;
  at("file").disabled = true;
  at("bar").removeAttribute("value"); // how much is read is not known yet
  at("progress").textContent = "Sending " + file.name + " ...";
  let points = [], before = 0, made = "", session = into, tokensBefore = null, share = 0;
  const used = current, chosen = into;
  const useRead = id => { // unless others were chosen meanwhile
    const next = into === chosen ? id : into;
    if (current === used || !current) use(id);
    into = next;
  };
  draw(points);
  try {
    if (!session) session = made = (await (await post("/v1/sessions", {notebook: at("keep").checked})).json()).id;
    tokensBefore = await tokens(session);
    const started = performance.now(), query = "?name=" + encodeURIComponent(file.name.slice(0, 200));
    const response = await request("/v1/sessions/" + session + "/read" + query, {
      method: "POST", body: file, signal: reading.signal,
      headers: {"Content-Type": "text/plain; charset=utf-8", Accept: "text/event-stream"},
    });
    for await (const event of events(response)) {
      if (event.recent_loss !== null && event.tokens > before) {
        const weight = event.tokens - before;
        points = extended(points, {tokens: event.tokens, weight, loss: event.recent_loss, mean: event.loss});
        before = event.tokens;
      }
      draw(points);
      const seconds = Math.max((performance.now() - started) / 1000, .001);
      share = event.session ? 1 : Math.min(event.bytes / file.size, .999);
      at("bar").value = share;
      at("progress").textContent = (event.session ? "Read: " : Math.floor(100 * share) + " % read: ") +
        count(event.tokens) + " tokens" + (event.loss === null ? "" : ", loss " + event.loss.toFixed(3)) + ", " +
        count(event.tokens / seconds) + " tokens/s" +
        (event.session || !share ? "" : ", " + duration(seconds / share - seconds) + " left");
      if (event.session) { useRead(event.session.id); made = ""; }
    }
    at("curve-title").textContent = "Loss along the text. " + at("progress").textContent;
  } catch (error) {
    // If only the response was lost, the text has been read all the same.
    const tokensAfter = session ? await tokens(session).catch(() => null) : tokensBefore;
    if (tokensAfter !== tokensBefore) { useRead(session); made = ""; }
    at("progress").textContent = tokensAfter === tokensBefore ? "The text was not read." :
      tokensAfter === null ? "It is not known whether the text was read." : "The text was read.";
    at("bar").value = 0;
    showError(error);
  } finally {
    reading = null;
    at("stop-reading").hidden = true;
    at("file").disabled = false;
    at("file").value = "";
    if (made) await request("/v1/sessions/" + made, {method: "DELETE"}).catch(() => {}); // it is empty
    await list();
  }
}

at("file").addEventListener("change", () => read(at("file").files[0]));
at("stop-reading").addEventListener("click", () => reading && reading.abort());
for (const name of ["dragenter", "dragover"])
  at("drop").addEventListener(name, event => { event.preventDefault(); at("drop").classList.add("over"); });
for (const name of ["dragleave", "drop"])
  at("drop").addEventListener(name, event => { event.preventDefault(); at("drop").classList.remove("over"); });
at("drop").addEventListener("drop", event => read(event.dataTransfer.files[0]));
window.addEventListener("beforeunload", event => { if (reading) event.preventDefault(); });

// -- asking

const words = text => [...text.matchAll(/[\p{L}\p{N}]+/gu)];

// The answer, with what stands word for word in a passage marked.
function marked(text, sources) {
  const plain = found => " " + found.map(word => word[0].toLowerCase()).join(" ") + " ";
  const found = words(text), passages = sources.map(source => plain(words(source.text)));
  const parts = [];
  let done = 0;
  for (let first = 0; first < found.length;) {
    let last = first;
    const stands = stop => passages.some(passage => passage.includes(plain(found.slice(first, stop))));
    while (last < found.length && stands(last + 1)) last++;
    if (last - first >= SAME_WORDS) {
      const stop = found[last - 1].index + found[last - 1][0].length;
      parts.push(text.slice(done, found[first].index), element("mark", text.slice(found[first].index, stop)));
      done = stop;
    }
    first = Math.max(last, first + 1);
  }
  return [...parts, text.slice(done)];
}

function passage(source) {
  const item = element("li"), place = element("div", "", "place"), part = element("i");
  const percent = number => 100 * number / Math.max(source.length, 1);
  item.append(element("strong", source.document || "a text without a name"), element("span",
    "characters " + count(source.start) + " to " + count(source.stop) + " of " + count(source.length) + ", " +
    percent(source.start).toFixed(0) + " % into it; score " + source.score.toPrecision(2)));
  // The policy of this page allows no style in an attribute; the script may set one.
  part.style.left = percent(source.start) + "%";
  part.style.width = percent(source.stop - source.start) + "%";
  place.append(part);
  item.append(place, element("blockquote", source.text.trim()));
  return item;
}

// One question with its answer. sources: null if the notebook was not searched. tokens: that the session had read.
function show(article, {question, answer, sources, tokens, mode}, ended = true) {
  const text = element("p", "", "answer");
  text.append(...(ended && sources ? marked(answer, sources) : [answer]));
  const memory = tokens ? "From memory: the model had read " + count(tokens) + " tokens." :
    "The model had read nothing.";
  const parts = [element("p", question, "question"), text, element("p", memory, "from")];
  if (mode === "text") { // one text
    text.prepend(element("span", question, "question"));
    parts.shift();
  }
  if (sources && !sources.length) parts.push(element("p", "In the notebook: no passage fits the question.", "from"));
  if (sources && sources.length) {
    const where = sources.length === 1 ? "it" : "them";
    const quoted = text.querySelector("mark") ? " Underlined words of the answer stand in " + where + "." : "";
    const details = element("details"), items = element("ol");
    const former = article.querySelector("details");
    details.open = former ? former.open : true;
    items.append(...sources.map(passage));
    details.append(element("summary", "From the notebook: " + sources.length +
      (sources.length === 1 ? " passage" : " passages") + " that the model was shown." + quoted), items);
    parts.push(details);
  }
  article.replaceChildren(...parts);
}

const stored = id => {
  try { return JSON.parse(sessionStorage.getItem("answers " + id)) || []; } catch { return []; }
};

function keepAnswer(id, exchange) {
  try {
    sessionStorage.setItem("answers " + id, JSON.stringify([exchange, ...stored(id)].slice(0, ANSWERS)));
  } catch { /* the browser keeps nothing, or has no more room */ }
}

function showAnswers() {
  at("answers").replaceChildren(...stored(current).map(exchange => {
    const article = element("article");
    show(article, exchange);
    return article;
  }));
}

async function write(event) {
  event.preventDefault();
  if (writing) return;
  showError(null);
  writing = new AbortController();
  at("send").disabled = true;
  at("stop-writing").hidden = false;
  const id = current, mode = at("mode").value, question = at("prompt").value;
  const find = () => sessions.find(one => one.id === id);
  while (id && !find() && await list()); // it has just read its first text
  const session = find();
  const exchange = {question, answer: "", sources: null, tokens: session ? session.tokens : 0, mode};
  const article = element("article");
  article.setAttribute("aria-busy", "true");
  at("answers").prepend(article);
  show(article, exchange, false);
  try {
    const body = {max_tokens: Number(at("most").value) || 200, stream: true};
    if (mode === "chat") body.messages = [{role: "user", content: question}];
    else body.prompt = question;
    if (id) Object.assign(body, {session: id, learn: at("learn").checked});
    if (session && session.notebook) body.notebook = at("notebook").checked;
    const path = mode === "chat" ? "/v1/chat/completions" : "/v1/completions";
    const response = await post(path, body, {signal: writing.signal});
    for await (const {choices: [choice]} of events(response)) {
      const part = choice.delta || choice;
      exchange.answer += part.content || part.text || "";
      if (part.sources) {
        exchange.sources = part.sources;
        show(article, exchange, false);
      } else {
        article.querySelector(".answer").lastChild.textContent = exchange.answer;
      }
    }
  } catch (error) {
    showError(error);
  } finally {
    show(article, exchange);
    article.removeAttribute("aria-busy");
    if (exchange.answer) keepAnswer(id, exchange);
    else article.remove();
    writing = null;
    at("send").disabled = false;
    at("stop-writing").hidden = true;
    await list();
  }
}

function showMode() {
  const chat = at("mode").value === "chat";
  at("prompt-label").textContent = chat ? "Question" : "Beginning, which the model continues";
  at("send").textContent = chat ? "Ask" : "Write";
}

at("ask").addEventListener("submit", write);
at("stop-writing").addEventListener("click", () => writing && writing.abort());
at("mode").addEventListener("change", showMode);

// What was chosen stays as it is when the page is loaded again.
for (const id of ["mode", "most", "notebook", "keep"]) {
  const one = at(id), field = one.type === "checkbox" ? "checked" : "value";
  try {
    const value = localStorage.getItem("page " + id);
    if (value !== null) one[field] = field === "checked" ? value === "true" : value;
    one.addEventListener("change", () => localStorage.setItem("page " + id, one[field]));
  } catch { /* the browser keeps nothing */ }
}

// -- sessions

function use(id) {
  if (id !== current && !writing) at("answers").replaceChildren();
  current = into = id;
  asked++;
  history.replaceState(null, "", id ? "#" + id : location.pathname);
}

function button(text, label, action) {
  const made = element("button", text);
  made.type = "button";
  made.setAttribute("aria-label", text + ": " + label);
  made.addEventListener("click", () => { showError(null); Promise.resolve(action()).catch(showError); });
  return made;
}

async function save(id) {
  const response = await request("/v1/sessions/" + id + "/export");
  const address = URL.createObjectURL(await response.blob()), link = element("a");
  link.href = address;
  link.download = /filename="(.*)"/.exec(response.headers.get("content-disposition"))[1];
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}

function nameOf(session) {
  const documents = session.notebook ? session.notebook.documents : [];
  return documents.length ? documents.join(", ") : session.id.slice(0, 13);
}

function item(session) {
  const row = element("li"), name = element("strong", nameOf(session)), actions = element("div", "", "row");
  const facts = session.error || new Date(1000 * session.created).toLocaleString() + ", " + count(session.tokens) +
    " tokens read, " + size(session.memory_bytes) + " of memory" +
    (session.notebook ? ", " + size(session.notebook.bytes) + " of notebook" : "") +
    (session.in_memory ? "" : ", on disk");
  row.setAttribute("aria-current", String(session.id === current));
  actions.append(
    button("Use", name.textContent, () => { use(session.id); showAnswers(); return list(); }),
    button("Read more", name.textContent, () => {
      use(session.id);
      showAnswers();
      return list().then(() => at("file").focus());
    }),
    button("Export", name.textContent, () => save(session.id)),
    button("Delete", name.textContent, async () => {
      if (!confirm("Delete this session? This cannot be undone.")) return;
      await request("/v1/sessions/" + session.id, {method: "DELETE"});
      await list();
    }),
  );
  row.append(name, element("span", facts), actions);
  return row;
}

// Shows the sessions that there are; returns whether a newer list is on its way, which shows them then.
async function list() {
  const now = ++asked;
  let data;
  try {
    ({data} = await (await request("/v1/sessions")).json());
  } catch (error) {
    if (!at("error").textContent) showError(error);
    return;
  }
  if (now !== asked) return true;
  sessions = data;
  if (current && !sessions.some(session => session.id === current)) use("");
  const news = JSON.stringify([sessions, current]);
  if (news !== shown) { // else a button stays that is just being pressed
    shown = news;
    at("sessions").replaceChildren(...sessions.map(item).reverse());
    at("into").replaceChildren(new Option("a new session", ""), ...sessions.map(session =>
      new Option(nameOf(session) + ", " + count(session.tokens) + " tokens", session.id)));
  }
  at("none").hidden = sessions.length > 0;
  at("into").value = into;
  if (at("into").selectedIndex < 0) at("into").value = into = "";
  at("keep-label").hidden = into !== "";
  const session = sessions.find(one => one.id === current);
  at("learn").disabled = !session;
  at("notebook").disabled = !session || !session.notebook;
  at("memory").textContent = !session ? "No session is in use: the model has read nothing." : "It has read " +
    nameOf(session) + ": " + count(session.tokens) + " tokens. " + (session.notebook ? "It keeps a notebook." :
      "It keeps no notebook, so all that it says is from memory.");
}

at("into").addEventListener("change", () => {
  into = at("into").value;
  at("keep-label").hidden = into !== "";
});
at("key").addEventListener("change", () => { showError(null); list(); });

showMode();
showAnswers();
list();
