// The demo page around draw.js: a wheel, a balance, the last draws.

import { DrawRefused, draw, pending, resume } from './draw.js';

const ACCOUNT = 'tombola.account';
const DRAWS = 'tombola.draws';
const DRAWS_MAX = 10;
const BALANCE_RETRY_MS = 2_000;

const REASONS = {
  INSUFFICIENT_BALANCE: 'The balance does not cover a draw',
  ACCOUNT_NOT_FOUND: 'There is no such account',
};

const byId = (id) => document.getElementById(id);
const [form, account, button] = ['form', 'account', 'draw'].map(byId);
const [balance, outcome, state] = ['balance', 'outcome', 'state'].map(byId);

// ---- The wheel -----------------------------------------------------------------------------------------------------

const FIELD_DEG = 36; // a tenth
// The fields that win, clockwise from the top, as index.html rotates them.
const PRIZES = [...document.querySelectorAll('#wheel .prize')].map((node) => turnOf(node) / FIELD_DEG);
const TURN_MS = 900;
const TURNS_AT_LEAST_MS = 900;
const STOP_DEG_MIN = 150;
const CALM_MS = 700; // with prefers-reduced-motion: a short wait instead of the turning wheel

const wheel = {
  node: byId('wheel'),
  angle: 0,
  turning: null,
  began: 0,

  spin() {
    if (this.began) return;
    this.began = performance.now();
    if (matchMedia('(prefers-reduced-motion: reduce)').matches) return;
    const frames = [{ transform: `rotate(${this.angle}deg)` }, { transform: `rotate(${this.angle + 360}deg)` }];
    this.turning = this.node.animate(frames, { duration: TURN_MS, iterations: Infinity });
  },

  /** Stop on a field that wins, or on one that does not. Resolves when the wheel stands. */
  async stop(won) {
    await pause((this.turning ? TURNS_AT_LEAST_MS : CALM_MS) - (performance.now() - this.began));
    const fields = [...Array(360 / FIELD_DEG).keys()].filter((field) => PRIZES.includes(field) === won);
    const field = fields[Math.floor(Math.random() * fields.length)];
    const rest = -(field + 0.7 * (Math.random() - 0.5)) * FIELD_DEG;
    if (this.turning) {
      const now = this.angle + (360 * (performance.now() - this.began)) / TURN_MS;
      const way = STOP_DEG_MIN + modulo(rest - now - STOP_DEG_MIN, 360);
      // The curve begins at three times its mean speed, so the wheel slows down from its present speed.
      const duration = (3 * way * TURN_MS) / 360;
      const frames = [{ transform: `rotate(${now}deg)` }, { transform: `rotate(${now + way}deg)` }];
      this.node.animate(frames, { duration, easing: 'cubic-bezier(0.333, 1, 0.667, 1)', fill: 'forwards' });
      this.turning.cancel();
      await pause(duration); // not until the animation's `finish` event, which hidden tabs do not get
    }
    this.halt(modulo(rest, 360));
  },

  /** Stop at once, at `angle`. */
  halt(angle = this.angle) {
    this.angle = angle;
    for (const animation of this.node.getAnimations()) animation.cancel();
    this.node.style.transform = `rotate(${angle}deg)`;
    this.turning = null;
    this.began = 0;
  },
};

// ---- Drawing -------------------------------------------------------------------------------------------------------

const underWay = new Set(); // request keys; more than one only after a reload that resumes several draws
let isClicked = false;
let showing = Promise.resolve();

async function play() {
  if (isBusy()) return; // the second half of a double click
  isClicked = true;
  showBusy();
  try {
    await draw(account.valueAsNumber, { show, tell });
  } catch (error) {
    if (!(error instanceof DrawRefused)) fail('This draw was not sent', error.message);
  } finally {
    isClicked = false;
    showBusy();
  }
}

const isBusy = () => isClicked || underWay.size > 0;

function showBusy() {
  button.setAttribute('aria-disabled', String(isBusy())); // not `disabled`: the button would lose the focus
}

/** Show a result; draw.js forgets the key when the promise resolves. Results wait for each other: there is one wheel. */
function show(result) {
  showing = showing.then(() => showNow(result));
  return showing;
}

async function showNow(result) {
  const won = result.status === 'completed' && Number(result.prize_amount) > 0;
  wheel.spin();
  await wheel.stop(won);
  outcome.className = `outcome ${won ? 'won' : result.status}`;
  outcome.textContent = sentence(result, won);
  state.className = 'state';
  state.textContent = result.status === 'completed' ? 'Charged once.' : 'Nothing was charged.';
  remember(result, won);
  underWay.delete(result.request_key);
  showBusy();
  if (result.account_id === account.valueAsNumber) refreshBalance();
}

function sentence({ status, reason, prize_amount }, won) {
  if (won) return `Won ${prize_amount} POINT`;
  if (status === 'completed') return 'No prize this time';
  if (status === 'rejected') return REASONS[reason] ?? `Rejected: ${plain(reason)}`;
  return 'This draw is dead: an operator can replay it';
}

/** Show the progress that draw.js reports. */
function tell(what, { key, why, delayMs }) {
  if (what === 'refused') {
    underWay.delete(key);
    showBusy();
    const isKept = pending().some((kept) => kept.key === key);
    const later = isKept ? '. The draw is sent again when this page is loaded again' : '';
    fail('The server did not accept this draw', inWords(why) + later);
    return;
  }
  underWay.add(key);
  showBusy();
  if (!wheel.began) {
    outcome.className = 'outcome';
    outcome.textContent = 'Drawing…';
    wheel.spin();
  }
  state.className = `state ${what}`;
  if (what === 'sending') state.textContent = 'Sending…';
  if (what === 'waiting') state.textContent = 'Accepted. Waiting for the result…';
  if (what === 'again') {
    state.textContent = `${inWords(why)}. Sending again ${inSeconds(delayMs)}, under the same key: still one draw.`;
  }
}

function fail(what, why) {
  wheel.halt();
  outcome.className = 'outcome';
  outcome.textContent = what;
  state.className = 'state failed';
  state.textContent = `${inWords(why)}.`;
}

const plain = (reason) => String(reason).toLowerCase().replaceAll('_', ' ');
const inSeconds = (ms) => (ms < 1_500 ? 'in a moment' : `in ${Math.round(ms / 1000)} seconds`);
const inWords = (text) => text.charAt(0).toUpperCase() + text.slice(1).replace(/\.$/, '');

// ---- The balance ---------------------------------------------------------------------------------------------------

let asked = 0;

async function refreshBalance() {
  const mine = ++asked; // an older answer must not overwrite a newer one
  const id = account.valueAsNumber;
  if (!account.validity.valid) {
    balance.textContent = '…';
    return;
  }
  const response = await fetch(`/v1/accounts/${id}`, { cache: 'no-store' }).catch(() => null);
  const answer = await response?.json().catch(() => null);
  if (mine !== asked) return;
  if (response?.ok && answer) {
    balance.textContent = `${answer.balance} ${answer.asset_code}`;
  } else if (response?.status === 404) {
    balance.textContent = 'no such account';
  } else {
    balance.textContent = '…';
    setTimeout(() => mine === asked && refreshBalance(), BALANCE_RETRY_MS);
  }
}

// ---- The last draws ------------------------------------------------------------------------------------------------

function drawsKept() {
  try {
    const draws = JSON.parse(localStorage.getItem(DRAWS));
    return Array.isArray(draws) ? draws : [];
  } catch {
    return []; // not this page's value
  }
}

function remember(result, won) {
  const { lottery_session_id: session, account_id, status, reason, prize_amount } = result;
  // Two tabs may finish the same draw.
  const others = drawsKept().filter((entry) => entry.session !== session);
  const entry = { at: Date.now(), session, account_id, status, reason, prize: won ? prize_amount : null };
  localStorage.setItem(DRAWS, JSON.stringify([entry, ...others].slice(0, DRAWS_MAX)));
  showDraws();
}

function showDraws() {
  const draws = drawsKept();
  byId('none').hidden = draws.length > 0;
  byId('draws').replaceChildren(...draws.map(listItem));
}

function listItem({ at, session, account_id, status, reason, prize }) {
  const item = document.createElement('li');
  item.className = prize ? 'won' : status;
  const when = part('time', 'at', new Date(at).toLocaleTimeString());
  when.dateTime = new Date(at).toISOString();
  const what = prize ? `won ${prize}` : status === 'completed' ? 'no prize' : `${status}: ${plain(reason)}`;
  item.append(part('span', 'what', what), part('span', 'account', `account ${account_id}`), when);
  item.append(part('code', 'session', session));
  return item;
}

function part(tag, name, text) {
  const node = document.createElement(tag);
  node.className = name;
  node.textContent = text;
  return node;
}

function turnOf(node) {
  return Number(/rotate\((\d+)\)/.exec(node.getAttribute('transform'))[1]);
}

// ---- Begin ---------------------------------------------------------------------------------------------------------

const pause = (ms) => new Promise((done) => setTimeout(done, Math.max(0, ms)));
const modulo = (value, by) => ((value % by) + by) % by;

function begin() {
  account.value = localStorage.getItem(ACCOUNT) ?? account.value;
  showDraws();
  refreshBalance();
  resume({ show, tell });
}

form.addEventListener('submit', (event) => {
  event.preventDefault();
  play();
});

account.addEventListener('input', () => {
  if (account.validity.valid) localStorage.setItem(ACCOUNT, account.value);
  refreshBalance();
});

// Draws of another tab.
addEventListener('storage', (event) => {
  if (event.key !== DRAWS) return;
  showDraws();
  refreshBalance();
});

try {
  begin();
} catch (error) {
  fail('This browser does not let the page store anything', error.message);
}
