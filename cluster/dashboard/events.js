// What happened: a timeline, a list, and what surrounds the event that was chosen.
import {draw, get, look, make, moment, number, ticks} from './parts.js';

const LANE = 34, LEFT = 8, RIGHT = 8, AXIS = 20, ROWS = 300;
const BEGIN = ['started', 'start', 'resume'], END = ['exit', 'stop', 'finish', 'finished', 'stopped',
                                                    'give_up'];
let runs = [], chosen = null, onChoice = () => {};

export function showEvents(found) {  // [{run, name, events, older}]
  runs = found;
  paint();
}

export function prepareEvents(told) {
  onChoice = told;
  document.getElementById('level').addEventListener('change', paint);
  new ResizeObserver(paintTimeline).observe(document.getElementById('timeline'));
}

function shown(event) {
  const level = document.getElementById('level').value;
  return level === 'all' || event.level === 'problem' || event.level === level;
}

function paint() {
  paintTimeline();
  paintList();
}

// ---- timeline ---------------------------------------------------------------------------------

function paintTimeline() {
  const box = document.getElementById('timeline'), width = box.clientWidth;
  const times = runs.flatMap(run => run.events.map(event => event.time));
  if (!times.length) { box.replaceChildren(); return; }
  const low = times.reduce((a, b) => Math.min(a, b));
  const high = Math.max(low + 1, times.reduce((a, b) => Math.max(a, b)));
  const x = time => LEFT + 8 + (time - low) / (high - low) * (width - LEFT - RIGHT - 16);
  const picture = draw('svg', {width, height: LANE * runs.length + AXIS, role: 'img',
    'aria-label': 'Timeline of events; the list below has the same events'});
  runs.forEach((run, lane) => {
    const y = lane * LANE + 22;
    picture.append(draw('text', {x: LEFT, y: y - 11}, run.name),
                   ...phases(run.events).map(([from, to]) => draw('rect', {
                     class: `phase ${look(run.run)}`, x: x(from), width: Math.max(1, x(to) - x(from)),
                     y: y - 3, height: 6, opacity: .45})),
                   ...run.events.filter(shown).map(event => mark(run.run, event, x(event.time), y)));
  });
  for (const tick of ticks(0, high - low, Math.max(2, width / 180)))
    picture.append(draw('text', {x: Math.max(40, Math.min(x(low + tick), width - 40)),
                                 'text-anchor': 'middle', y: LANE * runs.length + 14},
                        high - low < 86400 ? moment(low + tick).slice(11, 19)
                          : moment(low + tick).slice(5, 16)));
  box.replaceChildren(picture);
}

function phases(events) {  // when ranks were at work
  const found = [];
  let begun = null;
  for (const event of events) {
    if (BEGIN.includes(event.event)) begun ??= event.time;
    else if (END.includes(event.event) && begun !== null) {
      found.push([begun, event.time]);
      begun = null;
    }
  }
  if (begun !== null) found.push([begun, Math.max(begun, events.at(-1).time)]);
  return found;
}

function mark(run, event, x, y) {  // a cross is a problem, a triangle a warning
  const shape = {problem: `M${x - 6},${y - 4} l2,-2 l4,4 l4,-4 l2,2 l-4,4 l4,4 l-2,2 l-4,-4 l-4,4 ` +
                          'l-2,-2 l4,-4 z',
                 warning: `M${x},${y - 7} l7,12 h-14 z`}[event.level] ||
    `M${x - 3.5},${y} a3.5,3.5 0 1,0 7,0 a3.5,3.5 0 1,0 -7,0`;
  const on = chosen && chosen.run === run && chosen.number === event.number;
  return draw('path', {class: `mark ${event.level} ${on ? 'on' : ''}`, d: shape,
                       onclick: () => choose(run, event)},
              draw('title', {}, `${event.event}, step ${event.step ?? '–'}, ${moment(event.time)}`));
}

// ---- list and details -------------------------------------------------------------------------

function paintList() {
  const focused = document.activeElement?.dataset?.event;
  const rows = runs.flatMap(run => run.events.filter(shown).map(event => ({...event, from: run})))
    .sort((a, b) => b.time - a.time);
  const older = runs.reduce((sum, run) => sum + run.older, 0) + Math.max(0, rows.length - ROWS);
  const body = rows.slice(0, ROWS).map(event => {
    const key = `${event.from.run}/${event.number}`;
    const on = chosen && chosen.run === event.from.run && chosen.number === event.number;
    return make('tr', {class: on ? 'on' : ''}, make('td', {}, moment(event.time).slice(5)),
      make('td', {}, make('button', {class: event.level, 'data-event': key, 'aria-pressed': !!on + '',
                                     onclick: () => choose(event.from.run, event)},
                          sign(event.level) + event.event)),
      make('td', {}, event.step === null ? '' : `step ${event.step}`),
      make('td', {}, runs.length > 1 ? event.from.name : ''));
  });
  const box = document.getElementById('list');
  box.replaceChildren(make('table', {}, make('tbody', {}, ...body)),
    make('p', {class: 'soft'}, rows.length ? '' : 'None.', older ? `${older} older ones.` : ''));
  if (focused) box.querySelector(`[data-event="${focused}"]`)?.focus({preventScroll: true});
}

const sign = level => ({problem: '✖ ', warning: '▲ '}[level] || '');

async function choose(run, event) {
  chosen = {run, number: event.number};
  onChoice(event.step);
  paint();
  const box = document.getElementById('detail');
  box.replaceChildren(make('p', {class: 'soft'}, 'reading'));
  try {
    const found = await get(`/api/around?run=${run}&event=${event.number}`);
    if (chosen.run === run && chosen.number === event.number)
      show(box, detail(event, found));
  } catch (error) {
    if (chosen.run === run && chosen.number === event.number)
      show(box, [make('p', {class: 'problem'}, error.message)]);
  }
}

function show(box, parts) {
  box.replaceChildren(...parts);
  const line = box.querySelector('pre b');
  if (line) line.parentNode.scrollTop = line.offsetTop - line.parentNode.clientHeight / 2;
}

function detail(event, {row, log, samples, report}) {
  const facts = Object.entries(row).filter(([key, value]) => value !== null &&
    !['time', 'event', 'step', 'ranks', 'log'].includes(key));
  return [
    make('h3', {}, `${event.event}, step ${event.step ?? '–'}, ${moment(event.time)}`),
    make('dl', {class: 'facts'}, ...facts.flatMap(([key, value]) => [
      make('dt', {}, key), make('dd', {}, typeof value === 'object' ? JSON.stringify(value)
        : typeof value === 'number' ? number(value) : String(value))])),
    ...(samples ? sampleTable(samples) : []),
    ...(report ? [make('h3', {}, 'Report on the attempt'), make('pre', {tabindex: 0}, report)] : []),
    make('h3', {}, log.name ? `Log around it (${log.name})` : 'Log'),
    log.why ? make('p', {class: 'soft'}, log.why)
      : make('pre', {tabindex: 0}, ...log.lines.map((line, at) =>
        at === log.at ? make('b', {}, line) : line + '\n'))];
}

function sampleTable(samples) {
  if (samples.why) return [make('h3', {}, 'Samples'), make('p', {class: 'soft'}, samples.why)];
  const head = ['scan', 'person', 'session', 'cohort', 'modality', 'dropped steps it was in'];
  return [
    make('h3', {}, `Samples at positions ${samples.positions[0]} to ${samples.positions[1] - 1}`),
    make('div', {class: 'scroll', tabindex: 0}, make('table', {},
      make('thead', {}, make('tr', {}, ...head.map(name => make('th', {}, name)))),
      make('tbody', {}, ...samples.rows.map(row => make('tr', {}, ...[
        row.scan_id, row.participant, row.session, row.cohort, row.modality, row.dropped]
        .map(value => make('td', {}, String(value)))))))),
    make('p', {class: 'soft'}, samples.count > samples.rows.length
      ? `${samples.rows.length} of ${samples.count} are shown.` : '')];
}
