// Ranks by host, coloured by one of their figures; dark is little, light is much (cividis).
import {duration, make, number} from './parts.js';

// what a rank does, by the letter that its cell then has in place of its number
const STATES = {step: '', starting: 'S', compiling: 'C', checkpoint: 'K', evaluation: 'E',
                'waiting for store': 'W'};
const NAMES = Object.keys(STATES);
const MEASURES = {
  own_s: ['own work of a micro-step', rank => rank.own_s, duration],
  data_s: ['of that, waiting for data', rank => rank.data_s, duration],
  step_s: ['time of its last step', rank => rank.step_s, duration],
  age_s: ['time since its last step', rank => Math.max(0, rank.age_s), duration],
  step: ['step', rank => rank.step, number],
  state: ['what it does', rank => Math.max(0, NAMES.indexOf(rank.state)), at => does(NAMES[at])]};
const does = state => state === 'step' ? 'takes steps' : state;
const STOPS = [[0, 32, 77], [65, 77, 107], [124, 123, 120], [188, 174, 108], [255, 233, 69]];
let runs = [], current = 0;

export function prepareHosts() {
  const measure = document.getElementById('measure');
  measure.append(...Object.entries(MEASURES).map(([key, [title]]) =>
    make('option', {value: key}, title)));
  for (const id of ['measure', 'host-run'])
    document.getElementById(id).addEventListener('change', paint);
  document.getElementById('hosts').addEventListener('keydown', move);
}

export function showHosts(found) {
  runs = found;
  const select = document.getElementById('host-run');
  if (select.options.length !== runs.length)
    select.replaceChildren(...runs.map((run, at) => make('option', {value: at}, run.name)));
  paint();
}

function paint() {
  const run = runs[Number(document.getElementById('host-run').value)] || runs[0];
  const [title, value, show] = MEASURES[document.getElementById('measure').value];
  if (!run) return;
  const known = run.ranks.map(value).filter(found => found !== null && found !== undefined);
  const low = known.reduce((a, b) => Math.min(a, b), Infinity);
  const greatest = known.reduce((a, b) => Math.max(a, b), -Infinity);
  // ranks are never quite alike: what differs by little looks alike
  const high = show === duration ? Math.max(greatest, 1.5 * low) : greatest;
  const slow = new Map((run.slow || []).map(item => [item.rank, item]));
  const focused = document.activeElement?.dataset?.rank;
  const box = document.getElementById('hosts');
  const hosts = Map.groupBy(run.ranks, rank => rank.host);
  box.replaceChildren(...[...hosts].map(([host, ranks]) => make('div', {class: 'host'},
    make('span', {title: host}, host), make('div', {class: 'cells'}, ...ranks.map(rank =>
      cell(rank, value(rank), low, high, title, show, slow.get(rank.rank)))))));
  if (!run.ranks.length)
    box.append(make('p', {class: 'soft'}, 'No rank has given a sign of life yet.'));
  document.getElementById('legend').replaceChildren(...(known.length ? [
    show(low), make('i', {'aria-hidden': 'true'}), show(high) + ' ',
    ...(slow.size ? [`· framed, with !: slower than the others (${slow.size}) `] : []),
    ...NAMES.filter(name => STATES[name] && run.ranks.some(rank => rank.state === name))
      .map(name => `· ${STATES[name]}: ${name} `)] : ['nothing is known of it']));
  if (focused) box.querySelector(`[data-rank="${focused}"]`)?.focus({preventScroll: true});
}

function cell(rank, value, low, high, title, show, slow) {
  const node = make('button', {
    type: 'button', 'data-rank': rank.rank, tabindex: rank.rank === current ? 0 : -1,
    class: slow ? 'slow' : '', 'aria-label': `rank ${rank.rank} on ${rank.host}: ${title} ` +
      (value === null || value === undefined ? 'unknown' : show(value)) + (slow ? ', slow' : ''),
    onpointerenter: () => tell(rank, slow),
    onfocus: () => { current = rank.rank; tell(rank, slow); }},
    slow ? '!' : STATES[rank.state] || String(rank.rank));
  if (value !== null && value !== undefined) {
    const [red, green, blue] = colour(high > low ? (value - low) / (high - low) : 0);
    node.style.backgroundColor = `rgb(${red}, ${green}, ${blue})`;
    node.style.color = red * .3 + green * .59 + blue * .11 > 120 ? '#000' : '#fff';
  }
  return node;
}

function colour(share) {
  const at = Math.min(STOPS.length - 2, Math.floor(share * (STOPS.length - 1)));
  const within = share * (STOPS.length - 1) - at;
  return STOPS[at].map((from, i) => Math.round(from + (STOPS[at + 1][i] - from) * within));
}

function tell(rank, slow) {
  document.getElementById('rank').textContent =
    `Rank ${rank.rank} on ${rank.host} (process ${rank.pid}): step ${rank.step}, ` +
    `${duration(Math.max(0, rank.age_s))} ago; own work ${duration(rank.own_s)}, of that waiting ` +
    `for data ${duration(rank.data_s)}; ${does(rank.state)}` +
    (slow ? `; the others need ${duration(slow.others_s)}` : '');
}

function move(event) {
  const cells = [...document.querySelectorAll('#hosts button')];
  const at = cells.indexOf(document.activeElement);
  const row = document.activeElement.parentNode?.children?.length || 1;
  const to = {ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + row, ArrowUp: at - row,
              Home: 0, End: cells.length - 1}[event.key];
  if (at < 0 || to === undefined) return;
  event.preventDefault();
  cells[Math.min(cells.length - 1, Math.max(0, to))].focus();
}
