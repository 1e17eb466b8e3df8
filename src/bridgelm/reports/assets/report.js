"use strict";
// Three small things: the theme button, a tooltip on the charts, and the viewer of sample rollouts.
// Text from runs only ever goes through textContent.
const root = document.documentElement;
document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

const tip = document.getElementById("tip");
document.addEventListener("mousemove", (event) => {
  const text = event.target.dataset ? event.target.dataset.tip : undefined;
  tip.style.display = text ? "block" : "none";
  if (!text) return;
  tip.textContent = text;
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = event.clientY + 16 + "px";
});

function viewer() {
  const block = document.getElementById("samples");
  if (!block) return;
  const data = JSON.parse(block.textContent);
  const rows = data.rows.map(([run, step, prompt, problem, completion, answer, reward, verdict, difficulty]) =>
    ({ run, step, prompt: data.prompts[prompt], problem, completion, answer, reward, verdict, difficulty }));
  const get = (id) => document.getElementById(id);
  const [runs, steps, verdicts, search, list, count] = ["v-run", "v-step", "v-verdict", "v-search", "v-list", "v-count"].map(get);
  const PAGE = 8;
  let page = 0;

  const option = (select, value, text) => {
    const item = document.createElement("option");
    item.value = value;
    item.textContent = text;
    select.append(item);
  };
  const element = (tag, name, text) => {
    const node = document.createElement(tag);
    node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  };

  function fillSteps() {
    const before = steps.value;
    steps.replaceChildren();
    option(steps, "", "all steps");
    const found = new Set(rows.filter((row) => row.run === Number(runs.value)).map((row) => row.step));
    for (const step of [...found].sort((a, b) => a - b)) option(steps, String(step), "step " + step);
    steps.value = found.has(Number(before)) && before !== "" ? before : "";
  }

  function card(row) {
    const node = element("article", "rollout " + (row.verdict === "correct" || row.verdict === "wrong" ? row.verdict : "error"));
    const head = element("div", "head");
    head.append(element("b", "verdict", row.verdict), element("span", "", "reward " + row.reward),
      element("span", "", "step " + row.step), element("span", "", row.problem),
      element("span", "", row.difficulty === null ? "" : "difficulty " + row.difficulty),
      element("span", "", row.answer === null ? "" : "answer " + row.answer));
    node.append(head, element("pre", "prompt", row.prompt), element("pre", "", row.completion));
    return node;
  }

  function show() {
    const needle = search.value.toLowerCase();
    const hits = rows.filter((row) => row.run === Number(runs.value)
      && (steps.value === "" || row.step === Number(steps.value))
      && (verdicts.value === "" || row.verdict === verdicts.value)
      && (needle === "" || (row.prompt + "\n" + row.completion + "\n" + row.problem).toLowerCase().includes(needle)));
    const pages = Math.max(1, Math.ceil(hits.length / PAGE));
    page = Math.min(page, pages - 1);
    const shown = hits.slice(page * PAGE, (page + 1) * PAGE);
    const right = hits.filter((row) => row.verdict === "correct").length;
    count.textContent = hits.length === 0 ? "no rollout matches" :
      (page * PAGE + 1) + "–" + (page * PAGE + shown.length) + " of " + hits.length + ", " + right + " right";
    list.replaceChildren(...shown.map(card));
    get("v-back").disabled = page === 0;
    get("v-next").disabled = page >= pages - 1;
    get("v-earlier").disabled = steps.selectedIndex <= 0;
    get("v-later").disabled = steps.selectedIndex >= steps.options.length - 1;
  }

  const restart = () => { page = 0; show(); };
  data.runs.forEach((name, i) => option(runs, String(i), name));
  runs.addEventListener("change", () => { fillSteps(); restart(); });
  for (const control of [steps, verdicts]) control.addEventListener("change", restart);
  search.addEventListener("input", restart);
  get("v-back").addEventListener("click", () => { page -= 1; show(); });
  get("v-next").addEventListener("click", () => { page += 1; show(); });
  get("v-earlier").addEventListener("click", () => { steps.selectedIndex -= 1; restart(); });
  get("v-later").addEventListener("click", () => { steps.selectedIndex += 1; restart(); });
  fillSteps();
  restart();
}
viewer();
