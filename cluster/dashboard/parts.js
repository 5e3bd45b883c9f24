// What several parts of the page use: elements, numbers, times.
export const DASHES = ['', '7 3', '2 3', '9 3 2 3', '4 4', '12 3'];
export const look = run => 'k' + run % DASHES.length;
export const dash = run => DASHES[run % DASHES.length];
const SVG = 'http://www.w3.org/2000/svg';

export function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}
export function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined)
      node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children);
  return node;
}
export const sample = run => draw('svg', {width: 34, height: 10, 'aria-hidden': 'true'},
  draw('line', {x1: 1, x2: 33, y1: 5, y2: 5, class: `line ${look(run)}`,
                'stroke-dasharray': dash(run)}));

export function number(value) {
  if (value === null || value === undefined) return '–';
  if (value !== 0 && (Math.abs(value) < .001 || Math.abs(value) >= 1e7))
    return value.toExponential(2);
  return Number(value.toPrecision(4)).toLocaleString('en');
}
export const share = value =>
  value === null || value === undefined ? '–' : `${number(Number((100 * value).toPrecision(3)))} %`;
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return '–';
  if (seconds < 1) return `${Math.round(1000 * Math.max(0, seconds))} ms`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 120) return `${minutes} min`;
  return minutes < 2880 ? `${Math.floor(minutes / 60)} h ${minutes % 60} min`
    : `${Math.floor(minutes / 1440)} d ${Math.floor(minutes / 60) % 24} h`;
}
export function moment(seconds) {
  const date = new Date(1000 * seconds), two = value => String(value).padStart(2, '0');
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ` +
    `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}
export function ticks(low, high, most) {
  const rough = (high - low) / most || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(width => width >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(at);
  return found;
}
export async function get(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}
