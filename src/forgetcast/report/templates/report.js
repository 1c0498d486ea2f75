const NARROW = 720;

async function draw(figure) {
  const chart = figure.querySelector(".chart");
  const spec = JSON.parse(figure.querySelector(".spec").textContent);
  const columns = spec.concat && chart.clientWidth >= NARROW ? spec.columns : 1;
  const signal = columns > 1 ? "childWidth" : "width";
  const { view } = await vegaEmbed(chart, { ...spec, columns }, { renderer: "svg", actions: false });
  const margin = chart.querySelector("svg").clientWidth - columns * view.signal(signal);
  const fit = () => view.signal(signal, Math.max(140, (chart.clientWidth - margin) / columns)).resize().runAsync();
  const follows = (spec.params ?? []).some((param) => param.name === "task");
  const show = (task) => follows && view.signal("task", task).resize().runAsync();
  await fit();
  return { fit, show };
}

const drawn = Promise.all([...document.querySelectorAll("figure")].map(draw));
drawn.then(() => document.body.classList.add("drawn"));

addEventListener("resize", async () => (await drawn).forEach(({ fit }) => fit()));
document.getElementById("picker").addEventListener("change", async ({ target }) => {
  (await drawn).forEach(({ show }) => show(Number(target.value)));
});
