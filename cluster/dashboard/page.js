// Asks the server every few seconds what is new, and hands it to the parts of the page.
import {prepareCharts, showCharts} from './charts.js';
import {prepareEvents, showEvents} from './events.js';
import {prepareHosts, showHosts} from './hosts.js';
import {duration, get, make, number, sample, share} from './parts.js';

const EVERY_MS = 2000;
const LEVELS = {running: 'good', finished: 'good', waiting: 'warning', stopped: 'warning',
                stalled: 'problem', failed: 'problem'};
const known = [];  // by run: what was fetched, and of which state
let hidden = new Set(), chosen = null, runs = [], range = 'all', asking = false;

async function refresh() {
  if (asking) return;
  asking = true;
  const pulse = document.getElementById('pulse');
  try {
    runs = await get('/api/runs');
    await Promise.all(runs.map(fetchNew));
    paint();
    pulse.className = '';
    pulse.textContent = `${runs.length} run${runs.length > 1 ? 's' : ''}, ` +
      `read ${duration(Math.max(...runs.map(run => run.read_age_s ?? 0)))} ago`;
  } catch (error) {
    pulse.className = 'bad';
    pulse.textContent = `What is shown is old: ${error.message}`;
  } finally {
    asking = false;
  }
}

async function fetchNew(run, at) {
  const old = known[at] || {}, first = firstStep(run);
  const key = `${run.rows} ${run.num_events} ${range}`;
  if (old.key === key) return;
  const [series, told] = await Promise.all([
    get(`/api/series?run=${at}&first=${first}`),
    old.events === run.num_events ? old.told : get(`/api/events?run=${at}`)]);
  known[at] = {key, series, told, events: run.num_events};
}

function firstStep(run) {
  const step = run.step || 0, value = Number(range);
  if (range === 'all') return 0;
  return Math.max(0, Math.round(value < 1 ? step * (1 - value) : step - value));
}

function paint() {
  const named = runs.map((run, at) => ({...run, at, name: nameOf(run, at)}));
  paintRuns(named);
  const lines = named.filter(run => known[run.at] && !hidden.has(run.at));
  showCharts(lines.map(run => ({run: run.at, name: run.name, series: known[run.at].series})), chosen);
  showEvents(lines.map(run => ({run: run.at, name: run.name, ...known[run.at].told})));
  showHosts(named);
}

function nameOf(run, at) {  // runs of one name are told apart by their number
  return runs.filter(other => other.name === run.name).length > 1 ? `${run.name} (${at})` : run.name;
}

function paintRuns(named) {
  const focused = document.activeElement?.dataset?.run;
  const box = document.getElementById('runs');
  box.replaceChildren(make('div', {class: 'runs'}, ...named.map(run => make('div', {class: 'run'},
    make('label', {title: run.uri},
      make('input', {type: 'checkbox', checked: !hidden.has(run.at), 'data-run': run.at,
                     onchange: () => { hidden.has(run.at) ? hidden.delete(run.at)
                       : hidden.add(run.at); paint(); }}),
      sample(run.at), make('span', {}, run.name),
      make('b', {class: `state ${LEVELS[run.state] || ''}`}, run.state || 'reading')),
    run.problem ? make('p', {class: 'problem'}, run.problem) : '',
    make('dl', {}, ...facts(run).map(([name, value]) =>
      make('div', {}, make('dt', {}, name), make('dd', {}, value))))))));
  if (focused) box.querySelector(`[data-run="${focused}"]`)?.focus({preventScroll: true});
}

function facts(run) {
  return [
    ['step', `${number(run.step)}${run.steps ? ' of ' + number(run.steps) : ''}`],
    ['loss', number(run.loss)], ['volumes/s', number(run.volumes_per_s)],
    ['left', duration(run.eta_s)],
    ['last checkpoint', run.last_checkpoint === null ? 'none yet' : `step ${run.last_checkpoint}`],
    ['its age', duration(run.checkpoint_age_s)],
    ['goodput', share(run.goodput)], ['lost steps', number(run.lost_steps)],
    ['restarts', number(run.restarts)]];
}

document.getElementById('range').addEventListener('change', event => {
  range = event.target.value;
  refresh();
});
prepareCharts();
prepareEvents(step => { chosen = step; paint(); });
prepareHosts();
refresh();
setInterval(refresh, EVERY_MS);
