// Campaigns in the page: the choice, the odds before payment, and a button for each number of pulls that is sold.

import { nameOf, short } from './prizes.js';

export const DEFAULT = 'default'; // the built-in campaign, which sells single draws
const ANSWER_TIMEOUT_MS = 5_000;

/** The gateway's answer to GET `path`; null if there is none, or if it is an error. */
export async function ask(path) {
  const response = await fetch(path, { signal: AbortSignal.timeout(ANSWER_TIMEOUT_MS) }).catch(() => null);
  return (response?.ok && (await response.json().catch(() => null))) || null;
}

/** Fill `select` with the campaigns of GET /v1/campaigns. */
export function showChoice(select, campaigns) {
  select.replaceChildren(
    ...campaigns.map(({ name, title, state }) => {
      const option = element('option', (title || name) + (state === 'open' ? '' : ` (${state})`));
      option.value = name;
      return option;
    }),
  );
  select.closest('.choice').hidden = campaigns.length < 2;
}

/** Put a button for each price into `node`: the first one has the id `draw`. A button's `data-pulls` is its number. */
export function showButtons(node, { prices, asset_code }) {
  const buttons = prices.map(({ pulls, cost }, index) => {
    const price = `${short(cost)} ${asset_code}`;
    const button = element('button', pulls === 1 ? `Draw for ${price}` : `${pulls} pulls for ${price}`);
    button.type = 'submit';
    button.dataset.pulls = pulls;
    if (!index) button.id = 'draw';
    return button;
  });
  node.replaceChildren(...buttons);
}

/** Show everything that a player must know before paying, as children of `node`. */
export function showOdds(node, campaign) {
  const { guarantees, tiers, odds_hash } = campaign;
  const hasGuarantees = guarantees.length > 0;
  const rows = campaign.prizes.map((prize) => ({ ...prize, name: nameOf(prize, campaign) }));
  const names = new Map(rows.map(({ code, name }) => [code, name]));
  const parts = [table('Chances at one pull', rows, names, hasGuarantees)];
  for (const { name, spent_from, chances } of tiers) {
    const details = element('details', '');
    const inTier = rows.map((row, index) => ({ ...row, ...chances[index] }));
    const caption = `Tier ${name}: from ${spent_from} ${campaign.asset_code} spent here`;
    details.append(element('summary', caption), table(caption, inTier, names, hasGuarantees));
    parts.push(details);
  }
  const notes = element('ul', '');
  notes.className = 'terms';
  notes.append(...[...guarantees.map((it) => it.words), ...terms(campaign)].map((text) => element('li', text)));
  if (notes.children.length) parts.push(notes);
  const hash = element('a', odds_hash);
  hash.href = `/v1/odds/${odds_hash}`;
  const named = element('p', 'Odds hash ');
  named.className = 'hash';
  named.append(hash);
  node.replaceChildren(...parts, named);
}

/** All prizes with their chances in one sentence: what the wheel shows, for those who do not see it. */
export function wheelInWords(campaign) {
  const shown = campaign.prizes.slice(0, 8).map((it) => `${nameOf(it, campaign)} ${it.chance.percent} %`);
  const more = campaign.prizes.length - shown.length;
  return `Wheel: ${shown.join(', ')}${more > 0 ? ` and ${more} more; the table of odds has all of them` : ''}`;
}

function table(caption, rows, names, hasGuarantees) {
  const node = element('table', '');
  const columns = ['Prize', 'Chance', ...(hasGuarantees ? ['With guarantees'] : [])];
  const head = node.createTHead().insertRow();
  for (const name of columns) {
    const cell = element('th', name);
    cell.scope = 'col';
    head.append(cell);
  }
  const body = node.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    const prize = element('th', row.name);
    prize.scope = 'row';
    const limits = limited(row, names);
    if (limits) prize.append(' ', element('small', `Limited: ${limits}`));
    const chance = element('td', `${row.chance.percent} %`);
    const fraction = element('small', `${row.chance.numerator}/`);
    fraction.append(document.createElement('wbr'), row.chance.denominator); // the only place where it may break
    chance.append(' ', fraction);
    line.append(prize, chance);
    if (hasGuarantees) line.append(element('td', `${row.effective_percent} %`));
  }
  node.prepend(element('caption', caption));
  return node;
}

// When a prize cannot be won, and what is drawn then; empty for one that can always be won.
function limited({ is_limited, per_account, instead }, names) {
  const limits = [];
  if (is_limited) limits.push('while stock lasts');
  if (per_account !== null) limits.push(`${per_account} per account`);
  if (instead !== null) limits.push(`then ${names.get(instead)}`);
  return limits.join('; ');
}

function terms({ state, opens, closes, limits, eligibility }) {
  const told = [];
  const at = (time) => new Date(time).toLocaleString();
  if (state !== 'open') told.push(`This campaign is ${state}.`);
  if (opens) told.push(`Opens ${at(opens)}.`);
  if (closes) told.push(`Closes ${at(closes)}.`);
  if (limits.per_day !== null) told.push(`At most ${limits.per_day} pulls a day (${limits.day}).`);
  if (limits.per_account !== null) told.push(`At most ${limits.per_account} pulls per account.`);
  if (eligibility.has_allow_list) told.push('Only for accounts on a list.');
  if (eligibility.has_deny_list) told.push('Not for accounts on a list.');
  return told;
}

/** An element with a text. */
export function element(tag, text) {
  const node = document.createElement(tag);
  node.textContent = text;
  return node;
}
