// Figures of several runs by step; one cursor for all charts.
import {dash, draw, look, make, number, sample, share, ticks} from './parts.js';

const CHARTS = [
  ['loss', 'Loss', number], ['volumes_per_s', 'Volumes per second', number],
  ['effective_rank', 'Effective rank', number],
  ['data_wait', 'Waiting for data', share],
  ['checkpoint_s', 'Checkpoint, seconds', number],
  ['step_s', 'Step, seconds', number]];
const HEIGHT = 180, LEFT = 52, RIGHT = 8, TOP = 8, BOTTOM = 22;
const STEP = 0, MEAN = 1, LEAST = 2, GREATEST = 3;
let lines = [], chosen = null, cursor = null, pointed = null, frames = [];

export function showCharts(found, selected) {  // [{run, name, series}], the step of an event
  lines = found;
  chosen = selected;
  paint();
}

export function prepareCharts() {
  const box = document.getElementById('charts');
  for (const [key, title, show] of CHARTS) {
    const picture = draw('svg', {height: HEIGHT, tabindex: 0, role: 'img', 'data-chart': key,
                                 onpointermove: event => point(event, frame),
                                 onkeydown: event => move(event, frame)});
    const frame = {key, title, show, picture, scale: null};
    frames.push(frame);
    frame.values = make('span', {});
    box.append(make('figure', {}, make('figcaption', {}, title, frame.values), picture));
  }
  new ResizeObserver(paint).observe(box);
}

function paint() {
  const steps = lines.flatMap(line => Object.values(line.series).flatMap(
    points => points.length ? [points[0][STEP], points.at(-1)[STEP]] : []));
  const [first, last] = steps.length ? [Math.min(...steps), Math.max(...steps)] : [0, 1];
  for (const frame of frames) paintOne(frame, first, Math.max(last, first + 1));
  tell();
}

function paintOne(frame, first, last) {
  const width = frame.picture.parentNode.clientWidth;
  const drawn = lines.map(line => [line, line.series[frame.key] || []])
    .filter(([, points]) => points.length);
  const values = drawn.flatMap(([, points]) => points.flatMap(
    point => [point[LEAST], point[GREATEST]]));
  let [low, high] = values.length ? [least(values), greatest(values)] : [0, 1];
  if (high === low) [low, high] = [low - Math.abs(low) / 2 - .01, high + Math.abs(high) / 2 + .01];
  const x = step => LEFT + (step - first) / (last - first) * (width - LEFT - RIGHT);
  const y = value => HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM);
  frame.scale = {x, first, last, width};
  const parts = [];
  for (const tick of ticks(low, high, 5))
    parts.push(draw('line', {class: 'axis', x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick)}),
               draw('text', {x: LEFT - 6, y: y(tick) + 4, 'text-anchor': 'end'}, frame.show(tick)));
  for (const tick of ticks(first, last, Math.max(3, width / 80)))
    parts.push(draw('text', {x: Math.min(x(tick), width - 18), y: HEIGHT - 6,
                             'text-anchor': 'middle'}, tick.toLocaleString('en')));
  for (const [line, points] of drawn) parts.push(...marks(line.run, points, x, y, frame.key));
  if (chosen !== null && chosen >= first && chosen <= last)
    parts.push(draw('line', {class: 'chosen', x1: x(chosen), x2: x(chosen), y1: TOP,
                             y2: HEIGHT - BOTTOM}));
  if (!drawn.length) parts.push(draw('text', {x: LEFT + 8, y: HEIGHT / 2}, 'nothing yet'));
  parts.push(frame.line = draw('line', {class: 'cursor', y1: TOP, y2: HEIGHT - BOTTOM,
                                        visibility: 'hidden'}));
  frame.picture.setAttribute('width', width);
  frame.picture.setAttribute('aria-label', `${frame.title}, steps ${first} to ${last}: ` +
    (drawn.map(([line, points]) => `${line.name} ${frame.show(points[0][MEAN])} to ` +
                                   frame.show(points.at(-1)[MEAN])).join('; ') || 'nothing yet'));
  frame.picture.replaceChildren(...parts);
}

function marks(run, points, x, y, key) {
  if (key === 'checkpoint_s')
    return points.map(point => draw('circle', {class: look(run), r: 2.5, cx: x(point[STEP]),
                                               cy: y(point[GREATEST])}));
  const at = (point, which) => `${x(point[STEP]).toFixed(1)},${y(point[which]).toFixed(1)}`;
  return [
    draw('polygon', {class: `band ${look(run)}`, points: [
      ...points.map(point => at(point, GREATEST)),
      ...points.toReversed().map(point => at(point, LEAST))].join(' ')}),
    draw('polyline', {class: `line ${look(run)}`, 'stroke-dasharray': dash(run),
                      points: points.map(point => at(point, MEAN)).join(' ')})];
}

// ---- the cursor -------------------------------------------------------------------------------

function point(event, frame) {
  pointed = frame;
  const {first, last, width} = frame.scale;
  const inside = event.clientX - frame.picture.getBoundingClientRect().left - LEFT;
  cursor = Math.round(first + Math.min(1, Math.max(0, inside / (width - LEFT - RIGHT))) *
                      (last - first));
  tell();
}

function move(event, frame) {
  const steps = [...new Set(lines.flatMap(line => (line.series[frame.key] || []).map(
    point => point[STEP])))].sort((a, b) => a - b);
  if (!steps.length) return;
  const by = (event.shiftKey ? 10 : 1) * ({ArrowRight: 1, ArrowLeft: -1}[event.key] || 0);
  const ends = {Home: 0, End: steps.length - 1};
  if (!by && !(event.key in ends)) return;
  event.preventDefault();
  pointed = frame;
  const here = cursor === null ? steps.length - 1 : nearest(steps, cursor);
  cursor = steps[by ? Math.min(steps.length - 1, Math.max(0, here + by)) : ends[event.key]];
  tell();
}

function tell() {
  if (cursor === null) return;
  for (const frame of frames) {
    const {x, first, last} = frame.scale;
    const inside = cursor >= first && cursor <= last;
    frame.line.setAttribute('visibility', inside ? 'visible' : 'hidden');
    for (const end of ['x1', 'x2']) frame.line.setAttribute(end, x(cursor));
  }
  for (const frame of frames) frame.values.replaceChildren(...lines.flatMap(line => {
    const value = valueOf(line, frame);
    return value === null ? [] : [make('span', {}, sample(line.run), frame.show(value))];
  }));
  const told = lines.map(line => [line, valueOf(line, pointed)])
    .filter(([, value]) => value !== null)
    .map(([line, value]) => `${line.name} ${pointed.show(value)}`);
  document.getElementById('reading').textContent =
    `Step ${cursor.toLocaleString('en')}: ${pointed.title.toLowerCase()} ${told.join(', ')}`;
}

function valueOf(line, frame) {
  const points = line.series[frame.key] || [];
  if (!points.length || cursor > points.at(-1)[STEP]) return null;
  return points[nearest(points.map(point => point[STEP]), cursor)][MEAN];
}

function nearest(steps, step) {
  let [low, high] = [0, steps.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle; else high = middle;
  }
  return step - steps[low] <= steps[high] - step ? low : high;
}
const least = values => values.reduce((a, b) => Math.min(a, b));
const greatest = values => values.reduce((a, b) => Math.max(a, b));
