// The demo page around draw.js: campaigns with their odds, a wheel, a balance, the last draws.

import { DrawRefused, draw, pending, resume } from './draw.js';
import { DEFAULT, ask, element, showButtons, showChoice, showOdds, wheelInWords } from './odds.js';
import { onWheel, outcomesOf, rarestOf, sentenceOf } from './prizes.js';
import { allReceipts, keepReceipt, linkTo, linksTo } from './receipts.js';
import { Wheel } from './turning.js';

const ACCOUNT = 'tombola.account';
const CAMPAIGN = 'tombola.campaign';
const DRAWS = 'tombola.draws';
const DRAWS_MAX = 10;
const RETRY_MS = 2_000;

const REASONS = {
  INSUFFICIENT_BALANCE: 'The balance does not cover a draw',
  ACCOUNT_NOT_FOUND: 'There is no such account',
  LIMIT_REACHED: 'The limit of pulls for this account is reached',
  NOT_ELIGIBLE: 'This account cannot take part in this campaign',
  CAMPAIGN_CLOSED: 'This campaign is closed',
};

const byId = (id) => document.getElementById(id);
const [form, account, select, buttons] = ['form', 'account', 'campaign', 'buttons'].map(byId);
const [balance, outcome, pulls, state] = ['balance', 'outcome', 'pulls', 'state'].map(byId);
const wheel = new Wheel(byId('wheel'));

// ---- Campaigns -----------------------------------------------------------------------------------------------------

let wanted = DEFAULT; // the name that the player chose, now or on an earlier visit
let chosen = DEFAULT; // the one whose odds and prices are shown, and by which a click draws
let shown = null; // its view, as soon as it has come
let choices = 0;

/** Load the list of campaigns, and show the wanted one, or the built-in one where that one is gone. */
async function loadCampaigns() {
  const list = await ask('/v1/campaigns');
  if (list) {
    showChoice(select, list.campaigns);
    await choose(list.campaigns.some((it) => it.name === wanted) ? wanted : DEFAULT);
  }
  if (!list || !shown) setTimeout(loadCampaigns, RETRY_MS);
}

/** Show a campaign as soon as its view has come; without a view the choice stays as it was. */
async function choose(name) {
  const mine = ++choices; // an older answer must not overwrite a newer one
  const view = await ask(`/v1/campaigns/${encodeURIComponent(name)}`);
  if (view && mine === choices) showCampaign(view);
  select.value = chosen;
}

function showCampaign(view) {
  chosen = view.name;
  if (JSON.stringify(view) === JSON.stringify(shown)) return;
  shown = view;
  wheel.show(onWheel(view));
  byId('frame').setAttribute('aria-label', wheelInWords(view));
  showOdds(byId('odds'), view);
  showButtons(buttons, view);
  showBusy();
}

/** The view by which a result was drawn, which is shown then; null where it has other odds by now, or is gone. */
async function viewOf({ campaign, odds_hash }) {
  const isIt = (view) => view?.name === campaign && (!odds_hash || view.odds_hash === odds_hash);
  if (!isIt(shown)) await choose(campaign);
  return isIt(shown) ? shown : null;
}

// ---- Drawing -------------------------------------------------------------------------------------------------------

const underWay = new Set(); // request keys; more than one only after a reload that resumes several draws
let isClicked = false;
let showing = Promise.resolve();

async function play(count) {
  if (isBusy()) return; // the second half of a double click
  isClicked = true;
  showBusy();
  const asked = chosen === DEFAULT ? {} : { campaign: chosen, pulls: count };
  try {
    if (await isAsShown()) await draw(account.valueAsNumber, { ...asked, show, tell, keep });
    else fail('The odds have changed', 'Nothing was sent: look at them, and draw again');
  } catch (error) {
    if (!(error instanceof DrawRefused)) fail('This draw was not sent', error.message);
  } finally {
    isClicked = false;
    showBusy();
  }
}

/** Whether a click still gets what the page shows. The built-in campaign never changes; a gateway that is away may tell
 *  nothing now, and takes the draw when it is back. */
async function isAsShown() {
  if (chosen === DEFAULT) return true;
  const { odds_hash } = shown;
  await choose(chosen);
  return shown.odds_hash === odds_hash;
}

const isBusy = () => isClicked || underWay.size > 0;

function showBusy() {
  // Not `disabled`: the button would lose the focus.
  for (const button of buttons.children) button.setAttribute('aria-disabled', String(isBusy()));
}

/** Show a result; draw.js forgets its key when the promise resolves. Results wait for each other: the wheel is one. */
function show(result) {
  showing = showing.then(() => showNow(result));
  return showing;
}

async function showNow(result) {
  wheel.spin();
  const view = await viewOf(result);
  const outcomes = result.status === 'completed' ? outcomesOf(result, view) : [];
  const isWon = outcomes.some((it) => it.isPrize);
  await wheel.stop(restOf(outcomes, view));
  outcome.className = `outcome ${isWon ? 'won' : result.status}`;
  outcome.textContent = outcomes.length ? sentenceOf(outcomes) : whyNot(result);
  if (outcomes.length > 1 || outcomes.some((it) => it.codes.length)) pulls.replaceChildren(...outcomes.map(card));
  state.className = 'state';
  state.textContent = result.status === 'completed' ? 'Charged once.' : 'Nothing was charged.';
  remember(result, outcomes);
  underWay.delete(result.request_key);
  showBusy();
  if (result.account_id === account.valueAsNumber) refreshBalance();
}

/** The prize on which the wheel comes to rest: what was won or, after a rejection, a prize that is none. */
function restOf(outcomes, view) {
  if (!outcomes.length) return shown?.prizes.find((it) => !it.grants.length)?.code;
  if (!view) wheel.show([]); // segments of other odds would say something else than the result
  return rarestOf(outcomes, view).code;
}

function card({ name, isPrize, codes }) {
  const item = element('li', name);
  item.className = isPrize ? 'won' : 'lost';
  item.append(...codes.map((code) => element('code', code)));
  return item;
}

function whyNot({ status, reason }) {
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
    loadCampaigns(); // it may have been paused, or may sell other pulls by now
    return;
  }
  underWay.add(key);
  showBusy();
  if (!wheel.isTurning) {
    clear('Drawing…');
    if (shown) wheel.show(onWheel(shown));
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
  clear(what);
  state.className = 'state failed';
  state.textContent = `${inWords(why)}.`;
}

function clear(text) {
  outcome.className = 'outcome';
  outcome.textContent = text;
  pulls.replaceChildren();
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
    setTimeout(() => mine === asked && refreshBalance(), RETRY_MS);
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

function remember(result, outcomes) {
  const { v, lottery_session_id: session, account_id, campaign, status, reason, prize_amount } = result;
  // Two tabs may finish the same draw.
  const others = drawsKept().filter((entry) => entry.session !== session);
  const won = outcomes.filter((it) => it.isPrize);
  const several = outcomes.length > 1 ? `in ${won.length} of ${outcomes.length} pulls` : won[0]?.name;
  const prize = won.length ? (v === 1 ? prize_amount : several) : null;
  const entry = { at: Date.now(), session, account_id, campaign, status, reason, prize };
  localStorage.setItem(DRAWS, JSON.stringify([entry, ...others].slice(0, DRAWS_MAX)));
  showDraws();
}

function showDraws() {
  const draws = drawsKept();
  byId('none').hidden = draws.length > 0;
  byId('draws').replaceChildren(...draws.map(listItem));
}

/** Keep a receipt as soon as it comes: a promise counts most where the result never does. */
function keep(receipt) {
  keepReceipt(receipt);
  showReceipts();
}

function showReceipts() {
  const receipts = allReceipts();
  const all = linkTo(receipts, `All signed receipts in this browser: ${receipts.length}`, 'receipts.jws');
  byId('receipts').replaceChildren(...(receipts.length ? [all] : []));
}

function listItem({ at, session, account_id, campaign = DEFAULT, status, reason, prize }) {
  const item = document.createElement('li');
  item.className = prize ? 'won' : status;
  const when = part('time', 'at', new Date(at).toLocaleTimeString());
  when.dateTime = new Date(at).toISOString();
  const what = prize ? `won ${prize}` : status === 'completed' ? 'no prize' : `${status}: ${plain(reason)}`;
  item.append(part('span', 'what', what), part('span', 'account', `account ${account_id}`), when);
  if (campaign !== DEFAULT) item.append(part('span', 'campaign', campaign));
  item.append(part('code', 'session', session));
  const receipts = part('span', 'receipts', '');
  receipts.append(...linksTo(session));
  if (receipts.hasChildNodes()) item.append(receipts);
  return item;
}

function part(tag, name, text) {
  const node = element(tag, text);
  node.className = name;
  return node;
}

// ---- Begin ---------------------------------------------------------------------------------------------------------

function begin() {
  account.value = localStorage.getItem(ACCOUNT) ?? account.value;
  showDraws();
  showReceipts();
  refreshBalance();
  wanted = localStorage.getItem(CAMPAIGN) ?? DEFAULT;
  loadCampaigns();
  resume({ show, tell, keep });
}

form.addEventListener('submit', (event) => {
  event.preventDefault();
  play(Number(event.submitter?.dataset.pulls ?? buttons.firstElementChild.dataset.pulls));
});

account.addEventListener('input', () => {
  if (account.validity.valid) localStorage.setItem(ACCOUNT, account.value);
  refreshBalance();
});

select.addEventListener('change', async () => {
  wanted = select.value;
  localStorage.setItem(CAMPAIGN, wanted);
  await choose(wanted);
  if (isBusy()) return;
  clear('Ready');
  state.textContent = '';
});

// Draws of another tab.
addEventListener('storage', (event) => {
  if (event.key !== DRAWS) return;
  showDraws();
  showReceipts();
  refreshBalance();
});

try {
  begin();
} catch (error) {
  fail('This browser does not let the page store anything', error.message);
}
