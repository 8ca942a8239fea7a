// Signed receipts, kept in this browser with its draws: what the gateway promised, and what came of each promise.
//
//     import { keepReceipt, linksTo } from './receipts.js';
//     await draw(6, { show, keep: keepReceipt });      // draw.js hands over each receipt as it comes
//     document.body.append(...linksTo(session));       // a file to download for each receipt of a draw
//
// Nothing is verified here: who keeps a receipt verifies it later, away from the gateway that signed it.

const KEPT = 'tombola.receipts.'; // one entry per lottery session, so that tabs do not overwrite each other's
const SESSIONS_MAX = 200;

/** Keep a receipt, for as long as it is among those of the last 200 draws. */
export function keepReceipt(receipt) {
  const session = saidBy(receipt)?.lottery_session_id;
  if (typeof session !== 'string') return; // not one that this release can read
  const receipts = [...new Set([...receiptsOf(session), receipt])]; // a repeat brings the same bytes
  localStorage.setItem(KEPT + session, JSON.stringify({ at: Date.now(), receipts }));
  for (const { name } of entries().slice(SESSIONS_MAX)) localStorage.removeItem(name);
}

/** The receipts of a draw, in the order in which they came. */
export const receiptsOf = (session) => read(KEPT + session).receipts;

/** The receipts of all draws, those of the last draw first: also of draws whose result never came. */
export const allReceipts = () => entries().flatMap(({ receipts }) => receipts);

/** A link for each receipt of a draw, which saves it as a file. */
export const linksTo = (session) => receiptsOf(session).map((receipt) => {
  const kind = String(saidBy(receipt)?.receipt);
  return linkTo([receipt], `receipt: ${kind}`, `${session}.${kind}.jws`);
});

/** A link that saves these receipts as a file, a receipt a line. */
export function linkTo(receipts, text, file) {
  const link = document.createElement('a');
  link.className = 'receipt';
  link.textContent = text;
  link.download = file;
  link.href = `data:application/jose,${receipts.map((it) => encodeURIComponent(`${it}\n`)).join('')}`;
  return link;
}

// What a receipt says: the second part of a JWS in compact form. Null for other text.
function saidBy(receipt) {
  try {
    return JSON.parse(atob(receipt.split('.')[1].replaceAll('-', '+').replaceAll('_', '/')));
  } catch {
    return null;
  }
}

function entries() {
  const names = Object.keys(localStorage).filter((name) => name.startsWith(KEPT));
  return names.map((name) => ({ name, ...read(name) })).sort((one, other) => other.at - one.at);
}

function read(name) {
  try {
    const { at, receipts } = JSON.parse(localStorage.getItem(name));
    return { at: Number(at) || 0, receipts: receipts.filter((it) => typeof it === 'string') };
  } catch {
    return { at: 0, receipts: [] }; // none yet, or not this file's value
  }
}
