const NARROW = 720;

function fit(spec, width) {
  if (!spec.concat) return { ...spec, width: "container" };
  const columns = width < NARROW ? 1 : 2;
  const panel = Math.max(160, width / columns - 90);
  return { ...spec, columns, concat: spec.concat.map((part) => ({ ...part, width: panel })) };
}

async function draw(figure) {
  const spec = JSON.parse(figure.querySelector(".spec").textContent);
  const chart = figure.querySelector(".chart");
  const { view } = await vegaEmbed(chart, fit(spec, chart.clientWidth), { renderer: "svg", actions: false });
  return { view, follows: (spec.params ?? []).some((param) => param.name === "task") };
}

const drawn = Promise.all([...document.querySelectorAll("figure")].map(draw));
drawn.then(() => document.body.classList.add("drawn"));

document.getElementById("picker").addEventListener("change", async (event) => {
  for (const { view, follows } of await drawn) {
    if (follows) await view.signal("task", Number(event.target.value)).runAsync();
  }
});
