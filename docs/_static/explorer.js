// Draws what the menus choose from EXPLORER (see kure_lib/site.py): {columns, rows, quantiles, looks}.
"use strict";

const rows = EXPLORER.rows.map((row) => Object.fromEntries(EXPLORER.columns.map((name, i) => [name, row[i]])));
const form = document.getElementById("chooser");
const CHOICES = ["model", "trained", "bits", "grid", "scope", "pipeline"];
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const by = (key, list) => Map.groupBy ? Map.groupBy(list, key) : list.reduce((m, x) => m.set(key(x), [...(m.get(key(x)) || []), x]), new Map());
const chosen = () => Object.fromEntries(CHOICES.map((name) => [name, form[name].value]));
const agree = (row, wanted, but) => CHOICES.every((name) => name === but || row[name] === wanted[name]);

/** Measured values of one menu, in the order in which they occur; those that do not go with the other menus are marked. */
function fill(name) {
  const wanted = chosen(), menu = form[name];
  const there = new Set(rows.filter((row) => agree(row, wanted, name)).map((row) => row[name]));
  for (const option of menu.options) option.text = option.value + (there.has(option.value) ? "" : " – not measured so");
}

/** Bits that change together: n/FP, n/n, FP/n, or n over fixed bits of activations. */
function family(bits) {
  const [weight, activation] = bits.split("/");
  if (weight === "FP") return ["FP/n", activation, "bits of activations"];
  if (weight === activation) return ["n/n", weight, "bits of weights and activations"];
  return [`n/${activation}`, weight, "bits of weights"];
}

function plot(id, data, x, title, at) {
  const named = Object.values(EXPLORER.looks);
  const colour = {
    field: "arm", type: "nominal", legend: { orient: "top", title: null },
    scale: { domain: named.map((look) => look.name), range: named.map((look) => look.color) },
  };
  const y = { field: "top1", type: "quantitative", title: "top-1 accuracy, %", scale: { zero: false } };
  const horizontal = { field: x, type: "quantitative", title, scale: { zero: false, padding: 12 }, axis: { tickMinStep: x === "n" ? 1 : 0.1 } };
  const words = { labelColor: "currentColor", titleColor: "currentColor", labelFontSize: 13, titleFontSize: 13 };
  return vegaEmbed(document.getElementById(id), {
    width: "container", height: 240, background: null, data: { values: data }, autosize: { type: "fit", contains: "padding" },
    layer: [
      { mark: { type: "rule", color: "currentColor", opacity: 0.3, strokeWidth: 6 }, data: { values: [{ at }] },
        encoding: { x: { field: "at", type: "quantitative" } } },
      { mark: { type: "line", strokeWidth: 2 },
        encoding: { x: horizontal, y: { ...y, aggregate: "mean" }, color: colour, strokeDash: { field: "arm", legend: null, scale: { domain: colour.scale.domain, range: named.map((look) => look.dash) } } } },
      { mark: { type: "point", filled: true, size: 45, opacity: 0.9 },
        encoding: { x: horizontal, y, color: colour, shape: { field: "arm", legend: null, scale: { domain: colour.scale.domain, range: ["square", "circle"] } },
          tooltip: [{ field: "arm" }, { field: "seed" }, { field: x, title }, { field: "top1", title: "top-1, %" }] } },
    ],
    config: { aria: false, view: { stroke: null }, legend: words, axis: { ...words, gridColor: "#8884", domainColor: "#888", tickColor: "#888" } },
  }, { renderer: "svg", actions: false }).then(() => { // its numbers are read from the sentence and the table
    document.querySelector(`#${id} svg`).setAttribute("aria-hidden", "true");
    for (const part of document.querySelectorAll(`#${id} [role]`)) part.removeAttribute("role");
  });
}

function sentence(pairs, arms) {
  const where = `${form.model.value}, bits ${form.bits.value}, ${form.grid.value}, ${form.scope.value}, ${form.pipeline.value}`;
  if (!arms.control || !arms.kure) return `Not measured: ${where}, at this step ratio. Menus mark what was not measured with the other choices.`;
  const [control, kure] = ["control", "kure"].map((arm) => mean(arms[arm].map((row) => row.top1)).toFixed(2));
  const gains = pairs.map(([, before, after]) => after - before), gain = mean(gains), n = gains.length;
  const what = `${where}, at Δ/Δ̃ = ${ratio()}: control ${control} %, KURE ${kure} %. `;
  const change = `KURE ${gain < 0 ? "loses" : "gains"} ${Math.abs(gain).toFixed(2)} points`;
  if (n < 2) return `${what}${change} with one seed, which decides nothing.`;
  const half = EXPLORER.quantiles[n] * Math.sqrt(gains.reduce((sum, each) => sum + (each - gain) ** 2, 0) / (n - 1) / n);
  const verdict = gain - half > 0 || gain + half < 0 ? "the interval lies on one side of zero" : "the interval holds zero, so the seeds do not decide";
  return `${what}${change} over ${n} seeds (95 % interval ${(gain - half).toFixed(2)} to ${(gain + half).toFixed(2)}): ${verdict}.`;
}

let ratios = [1];
const ratio = () => ratios[form.ratio.value] ?? 1;

/** The slider runs over the measured ratios and stays where it was, as nearly as it can. */
function slide(measured, before) {
  ratios = measured.length ? measured : [1];
  form.ratio.max = ratios.length - 1;
  form.ratio.disabled = ratios.length < 2;
  form.ratio.value = ratios.reduce((best, each, i) => Math.abs(each - before) < Math.abs(ratios[best] - before) ? i : best, 0);
}

async function draw() {
  const wanted = chosen(), before = ratio();
  CHOICES.forEach(fill);
  const here = rows.filter((row) => agree(row, wanted));
  slide([...new Set(here.map((row) => row.ratio))].sort((a, b) => a - b), before);
  const at = ratio(), [kind, n, title] = family(wanted.bits);
  const now = here.filter((row) => row.ratio === at), arms = Object.fromEntries(by((row) => row.arm, now));
  const related = rows.filter((row) => row.ratio === at && agree(row, wanted, "bits"));
  const inFamily = related.map((row) => [...family(row.bits), row]).filter(([other, bits]) => other === kind && bits !== "FP");
  const pairs = (arms.control || []).flatMap((row) => {
    const partner = (arms.kure || []).find((other) => other.seed === row.seed);
    return partner ? [[row.seed, row.top1, partner.top1]] : [];
  });
  const named = (list) => list.map((row) => ({ ...row, arm: EXPLORER.looks[row.arm].name }));
  document.getElementById("ratio-shown").value = ratios.length < 2 ? `${at} alone was measured` : at;
  document.getElementById("gain").textContent = sentence(pairs, arms);
  document.getElementById("numbers").innerHTML = pairs.length ? `<table><thead><tr><th scope="col">seed</th><th scope="col">control, %</th><th scope="col">KURE, %</th><th scope="col">gain</th></tr></thead><tbody>${pairs
    .map(([seed, one, two]) => `<tr><th scope="row">${seed}</th><td>${one.toFixed(2)}</td><td>${two.toFixed(2)}</td><td>${(two - one).toFixed(2)}</td></tr>`).join("")}</tbody></table>` : "";
  await Promise.all([
    plot("by-ratio", named(here), "ratio", "step ratio Δ/Δ̃", at),
    plot("by-bits", named(inFamily.map(([, bits, , row]) => ({ ...row, n: Number(bits) }))), "n", title, n === "FP" ? 0 : Number(n)),
  ]);
  form.dataset.drawn = JSON.stringify({ ...wanted, ratio: at });
}

for (const name of CHOICES) {
  const values = [...new Set(rows.map((row) => row[name]))];
  form[name].replaceChildren(...values.map((value) => new Option(value, value)));
  if (values.includes(EXPLORER.first[name])) form[name].value = EXPLORER.first[name];
}
form.addEventListener("input", draw);
slide([1], 1);
draw();
