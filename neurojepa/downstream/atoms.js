// Draws the cards of atoms_page.py: what stands in #data, in the order that the reader chooses.
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const [X, Y, Z] = data.counts, PLANES = [[Y, Z], [X, Z], [X, Y]];
const CELL = Math.max(2, Math.floor(92 / Math.max(X, Y, Z))), PAGE = 12, BARS = 6;
const NUMBER = 0, SHARE = 1, MEAN = 2, PEAK = 3, REGION = 4, SELECTIVE = 5, MODALITY = 6, TOP = 7;
const percent = value => (100 * value).toFixed(value < .001 ? 3 : 1) + ' %';
const short = value => value && value < .001 ? value.toExponential(1)
  : value.toPrecision(2);
const place = mm => mm ? mm.map(value => Math.round(value)).join(', ') : 'none';
function make(tag, name, ...children) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  node.append(...children);
  return node;
}
function loaded(source) {
  const image = new Image();
  image.src = source;
  return image.decode().then(() => image);
}
function draw(maps, position, outlines) {
  const box = make('div', 'views');
  let at = position * PLANES.reduce((sum, [w, h]) => sum + w * h, 0);
  PLANES.forEach(([w, h], plane) => {
    const canvas = make('canvas');
    canvas.width = w * CELL;
    canvas.height = h * CELL;
    const pen = canvas.getContext('2d');
    for (let i = 0; i < w; i++) for (let j = 0; j < h; j++) {
      const value = maps[at + i * h + j] / 255;
      pen.fillStyle = `rgba(197, 48, 48, ${value})`;
      if (value) pen.fillRect(i * CELL, (h - 1 - j) * CELL, CELL, CELL);
    }
    pen.drawImage(outlines[plane], 0, 0, canvas.width, canvas.height);
    canvas.title = ['from the right: front is right', 'from behind: left is left',
                    'from above: left is left'][plane];
    box.append(canvas);
    at += w * h;
  });
  return box;
}
function bars(names, values, most) {
  const ranked = names.map((name, i) => [name, values[i]]).filter(pair => pair[1] !== null)
    .sort((a, b) => b[1] - a[1]).slice(0, most);
  const largest = Math.max(1e-12, ...ranked.map(pair => pair[1]));
  return ranked.map(([name, value]) => {
    const length = make('i');
    length.style.width = 100 * value / largest + '%';
    return make('div', 'bar', make('span', '', name), make('span', '', length),
                make('span', '', short(value)));
  });
}
function card(group, row, position, outlines) {
  const strongest = row[TOP].map(([scan, modality, mm, value]) => make('div', '',
    make('code', '', scan), ` ${modality} at ${place(mm)}: ${short(value)}`));
  const rest = make('details', '', make('summary', '', 'modalities, strongest scans'),
    ...bars(group.modalities, row[MODALITY], 8), ...strongest);
  return make('div', 'card', make('h3', '', `${group.kind} ${row[NUMBER]}`),
    make('div', 'facts', `${percent(row[SHARE])} of tokens, `
      + (group.kind === 'atom' ? `mean ${short(row[MEAN])}, ` : '')
      + `peak at ${place(row[PEAK])} mm`),
    draw(group.bytes, position, outlines), ...bars(data.regions, row[REGION], BARS), rest);
}
function show(box, group, outlines) {
  const order = make('select'), search = make('input'), cards = make('div', 'cards');
  const more = make('button', '', 'more'), count = make('span', 'facts');
  const orders = [['number', row => -row[NUMBER]], ['share of tokens', row => row[SHARE]],
    ['mean where active', row => row[MEAN]],
    ['largest selectivity', row => Math.max(...row[SELECTIVE].map(value => value ?? -2))],
    ...data.regions.map((name, i) =>
      ['selectivity for ' + name, row => row[SELECTIVE][i] ?? -2])];
  orders.forEach(([name], i) => order.append(new Option('by ' + name, i)));
  order.value = group.kind === 'atom' ? 3 : 0;
  search.placeholder = 'number';
  search.size = 7;
  search.setAttribute('aria-label', group.kind + ' number');
  order.setAttribute('aria-label', 'order');
  let ranked = [];
  function fill(most) {
    const from = cards.children.length;
    for (const i of ranked.slice(from, from + most))
      cards.append(card(group, group.rows[i], i, outlines));
    count.textContent = `${cards.children.length} of ${ranked.length}`;
    more.hidden = cards.children.length >= ranked.length;
  }
  function restart() {
    const key = orders[order.value][1], wanted = search.value.trim();
    ranked = [...group.rows.keys()].filter(i => !wanted || group.rows[i][NUMBER] === +wanted)
      .sort((a, b) => key(group.rows[b]) - key(group.rows[a]));
    cards.replaceChildren();
    fill(PAGE);
  }
  order.onchange = search.oninput = restart;
  more.onclick = () => fill(4 * PAGE);
  box.append(make('div', 'controls', order, search, count), cards, make('p', '', more));
  restart();
}
Promise.all(data.outlines.map(loaded)).then(outlines => {
  for (const box of document.querySelectorAll('.group')) {
    const group = data.groups[box.dataset.group];
    group.bytes = Uint8Array.from(atob(group.maps), c => c.charCodeAt(0));
    show(box, group, outlines);
  }
});
