"use strict";

// Names come from clients: every text goes in as text, never as markup.
const at = (id) => document.getElementById(id);
const number = (value, digits = 0) =>
  value === null || value === undefined ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits });

let last = null;
const rates = [];

function show(status) {
  at("model").textContent = status.model;
  at("state").textContent = status.ready ? "ready" : "draining";
  at("state").className = status.ready ? "good" : "bad";
  at("running").textContent = number(status.running);
  at("waiting").textContent = number(status.waiting);
  at("failed").textContent = number(status.failed_steps);
  const pages = status.pages;
  at("pages").textContent = `${number(pages.used)} of ${number(pages.total)}, ${number(pages.cached)} cached`;
  at("pages-meter").value = pages.total ? pages.used / pages.total : 0;
  if (last !== null && status.time > last.time) {
    rates.push(Math.max(0, status.generated_tokens - last.generated_tokens) / (status.time - last.time));
    rates.splice(0, rates.length - 60);
    at("rate").textContent = number(rates[rates.length - 1], 1);
    const most = Math.max(1, ...rates);
    const points = rates.map((rate, i) => `${2 * i},${27 - 26 * (rate / most)}`).join(" ");
    at("rates").firstElementChild.setAttribute("points", points);
  }
  last = status;
  const rows = status.adapters.map((one) => {
    const row = document.createElement("tr");
    row.dataset.adapter = one.name;
    const first = one.first_token_seconds;
    const cells = [
      one.name, one.version, one.error ? `${one.state}: ${one.error}` : one.state + (one.pinned ? ", pinned" : ""),
      one.residency, number(one.max_rank), number(one.bytes / 1048576, 1), number(one.running), number(one.waiting),
      number(one.generated_tokens), number(first === null || first === undefined ? null : 1000 * first, 1),
      number(one.load_seconds, 2),
    ];
    cells.forEach((value, i) => {
      const cell = document.createElement("td");
      cell.textContent = value;
      if (i > 3) cell.className = "number";
      row.append(cell);
    });
    return row;
  });
  document.querySelector("#adapters tbody").replaceChildren(...rows);
  at("empty").hidden = rows.length > 0;
  const loaded = new Set(status.adapters.map((one) => one.name));
  const others = status.available.filter((name) => !loaded.has(name));
  at("available").textContent = others.length ? `Loaded when first named: ${others.join(", ")}` : "";
}

async function poll() {
  try {
    const answer = await fetch("/status.json", { cache: "no-store" });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    show(await answer.json());
  } catch (error) {
    at("state").textContent = `no answer (${error.message})`;
    at("state").className = "bad";
  }
  setTimeout(poll, 1000);
}

poll();
